//! Architectures as calls on the tape, and the adapter that attaches to them.
//!
//! ```text
//! folder ─ formats ─> Model (frozen, mapped) ┐
//!                     Adapter (A, B, router) ┴─> Tape ─> loss, gradients, tokens
//! ```
//!
//! A [`Model`] knows its modules by Hugging Face's names, so that an adapter's `target_modules` mean
//! what they mean in PEFT.

pub mod bart;
pub mod batch;
pub mod cache;
pub mod dataset;
pub mod decoder;
pub mod gpt2;
pub mod lora;
pub mod merge;
pub mod mixing;
pub mod network;
pub mod presets;
mod rope;
pub mod routed_lora;
pub mod routing;
pub mod t5;
pub mod targets;
pub mod token_cache;
pub mod united;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use bart::Bart;
pub use batch::{Batch, Example, Layout};
pub use decoder::Decoder;
pub use gpt2::Gpt2;
pub use mixing::Mixing;
pub use network::Network;
pub use routed_lora::Adapter;
pub use t5::T5;

use crate::{
    dtype::Dtype,
    error::{Error, Result},
    formats::{
        checkpoint::{Checkpoint, TensorUse},
        config::{GenerationConfig, ModelConfig},
        fingerprint::Fingerprint,
        mmap::{Access, MappedFile},
        poly_config::PolyConfig,
    },
    kernels::{Backend, cpu::Cpu, cuda::catch_faults},
    tensor::Bytes,
};

/// How a model is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The compute type; none: bf16 where the weights are 16-bit, else f32.
    pub dtype: Option<Dtype>,
    /// Threads; 0: one a core.
    pub n_threads: usize,
    /// Whether the weights are mapped or read into memory. Who truncates a mapped file ends this process by SIGBUS.
    pub access: Access,
}

/// A module of the base, as Hugging Face names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Dotted path inside the base model.
    pub path: String,
    /// What it is.
    pub kind: ModuleKind,
}

/// What a module of the base is, as far as adapters care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// A linear that can be adapted, `[d_out, d_in]`, with its number.
    Linear {
        /// Its number among the linears.
        index: usize,
        /// Input features.
        d_in: usize,
        /// Output features.
        d_out: usize,
    },
    /// The output head: a linear that adapters leave alone.
    Head,
    /// Anything else.
    Other,
}

/// A frozen, memory-mapped base.
pub struct Model<B: Backend = Cpu> {
    backend: B,
    dir: PathBuf,
    config: ModelConfig,
    generation: GenerationConfig,
    network: Box<dyn Network<B>>,
    modules: Vec<Module>,
    tensors: Vec<TensorUse>,
    files: Vec<Arc<MappedFile>>,
}

impl<B: Backend> fmt::Debug for Model<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Model({})", self.dir.display())
    }
}

impl Model<Cpu> {
    /// Opens a Hugging Face model folder on the CPU. Nothing is read but headers; weights are mapped
    /// and touched when they are used.
    ///
    /// # Errors
    /// If a file is missing or malformed, a tensor is missing, unexpected or of another shape than
    /// `config.json` implies, or a setting is not supported: the message names it.
    pub fn open(dir: impl AsRef<Path>, options: &Options) -> Result<Self> {
        let dir = dir.as_ref();
        let (config, checkpoint) =
            (ModelConfig::open(dir)?, Checkpoint::open_with(dir, options.access)?);
        let dtype = options.dtype.unwrap_or_else(|| natural_dtype(&checkpoint));
        Self::build(Cpu::new(dtype, options.n_threads)?, config, checkpoint)
    }
}

/// bf16 where the weights are 16-bit, else f32.
pub(crate) fn natural_dtype(checkpoint: &Checkpoint) -> Dtype {
    let mut bytes = [0_u64; 2]; // Of 16-bit and of other tensors.
    for name in checkpoint.names() {
        if let Some(info) = checkpoint.info(name) {
            let sixteen = matches!(info.dtype.dtype(), Some(Dtype::Bf16 | Dtype::F16));
            bytes[usize::from(!sixteen)] += info.range.len() as u64;
        }
    }
    if bytes[0] > bytes[1] { Dtype::Bf16 } else { Dtype::F32 }
}

impl<B: Backend> Model<B> {
    /// Opens a model folder on a given backend.
    ///
    /// # Errors
    /// As [`Model::open`], and if a GPU fails or has too little memory.
    pub fn open_on(backend: B, dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let (config, checkpoint) = (ModelConfig::open(dir)?, Checkpoint::open(dir)?);
        catch_faults(|| Self::build(backend, config, checkpoint))
    }

    /// The model of a folder whose weights are open, none of them used yet.
    ///
    /// # Errors
    /// As [`Model::open_on`].
    pub fn from_checkpoint(backend: B, checkpoint: Checkpoint) -> Result<Self> {
        let config = ModelConfig::open(checkpoint.dir())?;
        catch_faults(|| Self::build(backend, config, checkpoint))
    }

    fn build(backend: B, config: ModelConfig, mut checkpoint: Checkpoint) -> Result<Self> {
        let (network, mut modules): (Box<dyn Network<B>>, _) = match &config {
            ModelConfig::T5(t5) => {
                (Box::new(T5::load(&backend, t5.clone(), &mut checkpoint)?), t5::modules(t5))
            }
            ModelConfig::Decoder(decoder) => {
                let network = Decoder::load(&backend, decoder.clone(), &mut checkpoint)?;
                (Box::new(network), decoder::modules(decoder))
            }
            ModelConfig::Bart(bart) => {
                let network = Bart::load(&backend, bart.clone(), &mut checkpoint)?;
                (Box::new(network), bart::modules(bart))
            }
            ModelConfig::Gpt2(gpt2) => {
                let network = Gpt2::load(&backend, gpt2.clone(), &mut checkpoint)?;
                (Box::new(network), gpt2::modules(gpt2))
            }
        };
        let dir = checkpoint.dir().to_path_buf();
        let generation = GenerationConfig::open(&dir, &config)?;
        let files = checkpoint.mapped_files();
        modules.shrink_to_fit();
        let tensors = checkpoint.finish()?;
        Ok(Self { backend, dir, config, generation, network, modules, tensors, files })
    }

    /// The backend that computes.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The folder that it came from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Which ids begin and end an output.
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// The layers.
    pub fn network(&self) -> &dyn Network<B> {
        self.network.as_ref()
    }

    /// Every module, in Hugging Face's order.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// What became of every tensor in the folder.
    pub fn tensors(&self) -> &[TensorUse] {
        &self.tensors
    }

    /// Rows of the embedding: ids must be below.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size()
    }

    /// The dropout that the base was trained with.
    pub fn dropout_rate(&self) -> f32 {
        self.config.dropout_rate()
    }

    /// How examples become tokens in training and evaluation (generation may start with another id:
    /// [`Model::generation`]).
    pub fn layout(&self) -> Layout {
        match self.config.decoder_start() {
            Some(start) => Layout::EncoderDecoder { start },
            None => Layout::Causal,
        }
    }

    /// Refuses an example that the model cannot compute: without input, with ids that are not in the
    /// vocabulary, longer than there are positions, or mixed as the adapter of this configuration
    /// cannot. Rows of a data file are checked when they are read; this is for examples from elsewhere.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn check_example(&self, example: &Example, adapter: Option<&PolyConfig>) -> Result<()> {
        let Example { input, labels, .. } = example;
        let fail = |detail: String| Err(Error::Usage(detail));
        if input.is_empty() {
            return fail("the example has no input; the model needs at least one token".into());
        }
        let vocab_size = self.vocab_size();
        if let Some(id) = input.iter().chain(labels).find(|&&id| id as usize >= vocab_size) {
            return fail(format!(
                "token id {id} is out of range: the model's vocabulary has {vocab_size} ids"
            ));
        }
        let longest = match self.layout() {
            Layout::EncoderDecoder { .. } => input.len().max(labels.len()),
            Layout::Causal => input.len() + labels.len(),
        };
        match self.config.max_positions() {
            Some(max) if longest > max => fail(format!(
                "the example has {longest} tokens, but the model has positions for {max}"
            )),
            _ => adapter
                .map_or(Ok(()), |config| example.mixing().check(config))
                .map_err(Error::Usage),
        }
    }

    /// What PEFT calls the model's task.
    pub fn task_type(&self) -> &'static str {
        match self.layout() {
            Layout::EncoderDecoder { .. } => "SEQ_2_SEQ_LM",
            Layout::Causal => "CAUSAL_LM",
        }
    }

    /// A fingerprint of the weights: of each file its length and its first and last 64 KiB. Reading
    /// all of a large base would take longer than it is worth.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut print = Fingerprint::default();
        for file in &self.files {
            let bytes = file.bytes();
            let part = bytes.len().min(1 << 16);
            print.add(&(bytes.len() as u64).to_le_bytes());
            print.add(&bytes[..part]);
            print.add(&bytes[bytes.len() - part..]);
        }
        print
    }

    /// Fails if a mapped file has changed since it was opened: what was computed from it since may
    /// be wrong.
    ///
    /// # Errors
    /// Names the file.
    pub fn verify_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.verify_unchanged())
    }
}
