//! Matrices: activations and parameters that live on a backend ([`Tensor`]), and frozen weights that
//! live in a mapped file ([`Frozen`]).
//!
//! Everything is a row-major matrix without padding. A batch of sequences is its tokens one after
//! the other (no padding tokens anywhere), so an activation is `[tokens, features]`.

use std::{fmt, ops::Range, sync::Arc};

use crate::{dtype::Dtype, kernels::Backend};

/// Bytes that outlive whoever reads them: a mapped file, or memory.
pub trait Bytes: Send + Sync + 'static {
    /// All of them.
    fn bytes(&self) -> &[u8];
}

/// [`Bytes`] that can be written: a caller's memory that a tensor lies in.
pub trait BytesMut: Bytes {
    /// All of them, for writing.
    fn bytes_mut(&mut self) -> &mut [u8];
}

impl Bytes for Vec<f32> {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self)
    }
}

impl BytesMut for Vec<f32> {
    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(self)
    }
}

impl Bytes for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

impl Bytes for &'static [u8] {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// A weight of the frozen base, read in place: little-endian elements, row-major, at any alignment.
///
/// Cloning clones a handle, not the bytes. The constructor checks that the range holds exactly
/// `rows x cols` elements, so kernels need not.
#[derive(Clone)]
pub struct Frozen {
    bytes: Arc<dyn Bytes>,
    range: Range<usize>,
    dtype: Dtype,
    rows: usize,
    cols: usize,
}

impl Frozen {
    /// The `[rows, cols]` matrix of `dtype` in `bytes[range]`. A vector has one row.
    ///
    /// # Panics
    /// If the range is not in `bytes` or does not hold exactly that many elements, or if `dtype` is
    /// not one that files have.
    pub fn new(
        bytes: Arc<dyn Bytes>,
        range: Range<usize>,
        dtype: Dtype,
        rows: usize,
        cols: usize,
    ) -> Self {
        let size = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size_bytes()));
        assert_eq!(Some(range.len()), size, "a frozen weight's bytes are its elements");
        assert!(bytes.bytes().get(range.clone()).is_some(), "a frozen weight lies in its file");
        assert_ne!(dtype, Dtype::F64, "files have f32, bf16 or f16");
        Self { bytes, range, dtype, rows, cols }
    }

    /// A matrix in memory, from values. For tests and derived weights.
    pub fn from_f32(values: &[f32], rows: usize, cols: usize, dtype: Dtype) -> Self {
        let bytes: Vec<u8> = match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::Bf16 => {
                values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect()
            }
            Dtype::F16 => {
                values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect()
            }
            Dtype::F64 => panic!("files have f32, bf16 or f16"),
        };
        let range = 0..bytes.len();
        Self::new(Arc::new(bytes), range, dtype, rows, cols)
    }

    /// The `[cols, rows]` matrix with rows and columns exchanged: a copy, in memory.
    pub fn transposed(&self) -> Self {
        let (size, bytes) = (self.dtype.size_bytes(), self.bytes());
        let mut out = vec![0; bytes.len()];
        for (i, to) in out.chunks_exact_mut(size).enumerate() {
            let (row, col) = (i % self.rows, i / self.rows);
            to.copy_from_slice(&bytes[(row * self.cols + col) * size..][..size]);
        }
        let range = 0..out.len();
        Self::new(Arc::new(out), range, self.dtype, self.cols, self.rows)
    }

    /// The same with a number added to each element: a copy in f32, in memory.
    pub fn plus(&self, number: f32) -> Self {
        let values: Vec<f32> = self.to_f32().into_iter().map(|value| value + number).collect();
        Self::from_f32(&values, self.rows, self.cols, Dtype::F32)
    }

    /// The `[rows, cols]` matrix of the elements from `first` on; nothing is copied.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn part(&self, first: usize, rows: usize, cols: usize) -> Self {
        let size = self.dtype.size_bytes();
        let start = self.range.start + first * size;
        let range = start..start + rows * cols * size;
        assert!(range.end <= self.range.end, "a part lies in its whole");
        Self::new(Arc::clone(&self.bytes), range, self.dtype, rows, cols)
    }

    /// The elements' bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes.bytes()[self.range.clone()]
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Rows: output features of a linear, ids of an embedding.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: input features of a linear, width of an embedding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Every element, widened to f32 (exact for all three types).
    pub fn to_f32(&self) -> Vec<f32> {
        let bytes = self.bytes();
        match self.dtype {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Dtype::Bf16 => {
                bytes.as_chunks().0.iter().map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect()
            }
            Dtype::F16 => {
                bytes.as_chunks().0.iter().map(|&b| half::f16::from_le_bytes(b).to_f32()).collect()
            }
            Dtype::F64 => unreachable!("checked by the constructor"),
        }
    }
}

impl fmt::Debug for Frozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frozen({} [{}, {}])", self.dtype, self.rows, self.cols)
    }
}

/// A matrix on a backend, `[rows, cols]`. Cloning shares the buffer.
pub struct Tensor<B: Backend> {
    pub(crate) buffer: Arc<B::Buffer>,
    pub(crate) dtype: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl<B: Backend> Tensor<B> {
    /// Wraps a buffer that holds `[rows, cols]` elements of `dtype`. For backends.
    pub(crate) fn new(buffer: B::Buffer, dtype: Dtype, rows: usize, cols: usize) -> Self {
        Self { buffer: Arc::new(buffer), dtype, rows, cols }
    }

    /// Rows (tokens, for an activation).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (features).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The same elements as another matrix, `[rows, cols]`.
    ///
    /// # Panics
    /// If the number of elements differs.
    pub fn reshaped(self, rows: usize, cols: usize) -> Self {
        assert_eq!(self.len(), rows * cols, "another shape has the same elements");
        Self { rows, cols, ..self }
    }

    /// The buffer for writing, if no one else holds it.
    pub(crate) fn buffer_mut(&mut self) -> Option<&mut B::Buffer> {
        Arc::get_mut(&mut self.buffer)
    }
}

impl<B: Backend> Clone for Tensor<B> {
    fn clone(&self) -> Self {
        Self {
            buffer: Arc::clone(&self.buffer),
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
        }
    }
}

impl<B: Backend> fmt::Debug for Tensor<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} [{}, {}])", self.dtype, self.rows, self.cols)
    }
}
