//! Commands on their way to the device: collected, and run as CUDA graphs.
//!
//! ```text
//! operation ─ push ─> pending commands ─ PIECE of them, or somebody reads ─> a graph ─> the stream
//! ```
//!
//! A step makes hundreds of launches that differ from the last step's in a few parameters (noise keys,
//! learning rates, lengths). So commands are not run when they are pushed. A piece of them is compared
//! with the last piece that had the same kernels at the same place of a step: its graph gets the
//! parameters that changed and is run in one call. What comes for the first time is run command by
//! command, as most of it does not come again.
//!
//! Why commands are written down here, and not captured from a stream while operations run: nothing that
//! an operation does (a table that is uploaded, memory that is asked for) can break a capture, since there
//! is none; parameters stay values that can be compared, so a graph is changed only where a step differs;
//! and a device without a driver, the tests' emulator, keeps a graph in the same way and shows a forgotten
//! change as wrong bits. The price is that the device waits for the first piece of a step, which is why
//! pieces are short.
//!
//! Two things do not wait in line. Memory is reserved and uploads are made at once, before commands that
//! were pushed earlier: new memory is nobody's, and [`Queue::has_run`] tells the arena which used memory
//! is nobody's any more. A device that gives memory back at once (`is_strict`), or that has no graphs
//! (`POLYTAPE_CUDA_GRAPHS=off`, `POLYTAPE_CUDA_SYNC=1`, a driver that refuses), runs each command when
//! it is pushed.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::device::{Arrival, Command, Device, Graph, Launch};
use crate::error::Result;

/// Commands of a graph at most: few enough that a device has work soon, and many to a call.
const PIECE: usize = 256;
/// Pieces that are remembered: some steps of different kinds.
const MAX_PIECES: usize = 256;

/// The way to a device.
pub(super) struct Queue {
    device: Arc<dyn Device>,
    state: Mutex<State>,
    /// Commands that were ever pushed, and those of them that the device has.
    n_pushed: AtomicU64,
    n_given: AtomicU64,
}

struct State {
    pending: Vec<Command>,
    /// Whether commands are collected.
    collects: bool,
    /// How many pieces there were since somebody read.
    place: usize,
    /// By what does not change.
    pieces: HashMap<u64, Piece>,
    clock: u64,
}

/// Commands that came before.
struct Piece {
    last_used: u64,
    /// From the second time on.
    recorded: Option<Recorded>,
}

struct Recorded {
    /// As the graph has them.
    commands: Vec<Command>,
    graph: Box<dyn Graph>,
}

/// What a graph cannot change of a command.
fn fixed(command: &Command) -> (&str, bool, usize) {
    match command {
        Command::Launch(Launch { kernel, bf16, args, .. }) => (kernel, *bf16, args.n()),
        Command::Copy { .. } => ("copy", false, 0),
        Command::Fill { .. } => ("fill", false, 0),
    }
}

fn key(place: usize, commands: &[Command]) -> u64 {
    let mut hasher = DefaultHasher::new();
    place.hash(&mut hasher);
    commands.iter().for_each(|command| fixed(command).hash(&mut hasher));
    hasher.finish()
}

impl Recorded {
    /// Whether these commands differ in nothing but what a graph can change.
    fn fits(&self, commands: &[Command]) -> bool {
        let same = |(a, b): (&Command, &Command)| fixed(a) == fixed(b);
        self.commands.len() == commands.len() && self.commands.iter().zip(commands).all(same)
    }

    /// Makes the graph one of these commands, which fit. Whether the device could.
    ///
    /// # Safety
    /// As for [`Graph::set`].
    unsafe fn change_to(&mut self, commands: &[Command]) -> Result<bool> {
        for (i, (old, new)) in self.commands.iter_mut().zip(commands).enumerate() {
            if old != new {
                // SAFETY: The caller's promise.
                if !unsafe { self.graph.set(i, new) }? {
                    return Ok(false);
                }
                old.clone_from(new);
            }
        }
        Ok(true)
    }
}

impl Queue {
    pub(super) fn new(device: Arc<dyn Device>) -> Self {
        let collects = device.has_graphs() && !device.is_strict();
        let state =
            State { pending: Vec::new(), collects, place: 0, pieces: HashMap::new(), clock: 0 };
        let (n_pushed, n_given) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { device, state: Mutex::new(state), n_pushed, n_given }
    }

    pub(super) fn device(&self) -> &dyn Device {
        &*self.device
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner) // Each change leaves it valid.
    }

    /// How many commands were pushed.
    pub(super) fn n_pushed(&self) -> u64 {
        self.n_pushed.load(Ordering::Acquire)
    }

    /// Whether the device has the first `n` commands that were pushed: what it is given now comes after
    /// them.
    pub(super) fn has_run(&self, n: u64) -> bool {
        self.n_given.load(Ordering::Acquire) >= n
    }

    /// Runs a command after those before it.
    ///
    /// # Safety
    /// As for [`Device::run`], until the command has run.
    pub(super) unsafe fn push(&self, command: Command) -> Result<()> {
        let mut state = self.state();
        let n = self.n_pushed.fetch_add(1, Ordering::AcqRel) + 1;
        if !state.collects {
            // SAFETY: The caller's promise.
            let ran = unsafe { self.device.run(&command) };
            self.n_given.store(n, Ordering::Release);
            return ran;
        }
        state.pending.push(command);
        if state.pending.len() == PIECE { self.give(&mut state) } else { Ok(()) }
    }

    /// Gives the device everything that was pushed.
    pub(super) fn flush(&self) -> Result<()> {
        self.give(&mut self.state())
    }

    /// Copies from the device what everything pushed so far leaves there. A step ends here.
    ///
    /// # Safety
    /// As for [`Device::read`].
    pub(super) unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.end_step()?;
        // SAFETY: The caller's promise.
        unsafe { self.device.read(from, bytes) }
    }

    /// [`Queue::read`] that does not wait.
    ///
    /// # Safety
    /// As for [`Device::fetch`].
    pub(super) unsafe fn fetch(&self, from: u64, bytes: usize) -> Result<Box<dyn Arrival>> {
        self.end_step()?;
        // SAFETY: The caller's promise.
        unsafe { self.device.fetch(from, bytes) }
    }

    fn end_step(&self) -> Result<()> {
        let mut state = self.state();
        let given = self.give(&mut state);
        state.place = 0;
        given
    }

    /// Gives the device what is pending; after an error that is lost, as a fault ends the run.
    fn give(&self, state: &mut State) -> Result<()> {
        let commands = std::mem::take(&mut state.pending);
        if commands.is_empty() {
            return Ok(());
        }
        // SAFETY: Whoever pushed a command promised it.
        let given = unsafe { self.give_piece(state, commands) };
        // The lock is held: nobody has pushed since.
        self.n_given.store(self.n_pushed(), Ordering::Release);
        given
    }

    /// # Safety
    /// As for [`Device::run`] of each.
    unsafe fn give_piece(&self, state: &mut State, commands: Vec<Command>) -> Result<()> {
        let key = key(state.place, &commands);
        state.place += 1;
        state.clock += 1;
        let clock = state.clock;
        let Some(piece) = state.pieces.get_mut(&key) else {
            state.remember(key, Piece { last_used: clock, recorded: None });
            // SAFETY: The caller's promise.
            return commands.iter().try_for_each(|command| unsafe { self.device.run(command) });
        };
        piece.last_used = clock;
        if let Some(recorded) = piece.recorded.as_mut().filter(|recorded| recorded.fits(&commands))
            // SAFETY: The caller's promise. What the graph has besides is what it is changed from.
            && unsafe { recorded.change_to(&commands) }?
        {
            // SAFETY: The graph has these commands and no others.
            return unsafe { recorded.graph.run() };
        }
        let Some(graph) = self.device.graph(&commands)? else {
            tracing::warn!("{}: kernels are launched one by one", self.device.name());
            state.collects = false;
            state.pieces.clear();
            // SAFETY: The caller's promise.
            return commands.iter().try_for_each(|command| unsafe { self.device.run(command) });
        };
        let recorded = piece.recorded.insert(Recorded { commands, graph });
        // SAFETY: The caller's promise: the graph has these commands.
        unsafe { recorded.graph.run() }
    }
}

impl State {
    /// Adds a piece; the one that was not used for longest makes room for it.
    fn remember(&mut self, key: u64, piece: Piece) {
        if self.pieces.len() >= MAX_PIECES
            && let Some(&oldest) =
                self.pieces.iter().min_by_key(|(_, piece)| piece.last_used).map(|(key, _)| key)
        {
            self.pieces.remove(&oldest);
        }
        self.pieces.insert(key, piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a device was asked for.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Asked {
        Run(u8),
        Graph(usize),
        Set(usize, u8),
        RunGraph(Vec<u8>),
        Read,
    }
    use Asked::{Read, Run, RunGraph, Set};

    /// A device that writes down what it is asked for.
    #[derive(Clone, Default)]
    struct Notes {
        asked: Arc<Mutex<Vec<Asked>>>,
        refuses_graphs: bool,
        refuses_changes: bool,
    }

    impl Notes {
        fn note(&self, asked: Asked) {
            self.asked.lock().unwrap().push(asked);
        }
        fn take(&self) -> Vec<Asked> {
            std::mem::take(&mut *self.asked.lock().unwrap())
        }
    }

    fn byte(command: &Command) -> u8 {
        let Command::Fill { byte, .. } = command else { return 255 };
        *byte
    }

    // SAFETY: Nothing is ever touched.
    unsafe impl Device for Notes {
        fn name(&self) -> String {
            "notes".into()
        }
        fn memory(&self) -> Result<(usize, usize)> {
            unreachable!()
        }
        fn alloc(&self, _: usize) -> Result<Option<u64>> {
            unreachable!()
        }
        unsafe fn free(&self, _: u64, _: usize) {}
        unsafe fn write(&self, _: u64, _: &[u8]) -> Result<()> {
            unreachable!()
        }
        unsafe fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
            self.note(Read);
            Ok(())
        }
        unsafe fn fetch(&self, _: u64, _: usize) -> Result<Box<dyn Arrival>> {
            unreachable!()
        }
        unsafe fn run(&self, command: &Command) -> Result<()> {
            self.note(Run(byte(command)));
            Ok(())
        }
        fn has_graphs(&self) -> bool {
            true
        }
        fn graph(&self, commands: &[Command]) -> Result<Option<Box<dyn Graph>>> {
            self.note(Asked::Graph(commands.len()));
            let bytes = commands.iter().map(byte).collect();
            let made = || Box::new(Noted { notes: self.clone(), bytes }) as Box<dyn Graph>;
            Ok((!self.refuses_graphs).then(made))
        }
    }

    struct Noted {
        notes: Notes,
        bytes: Vec<u8>,
    }

    // SAFETY: As above.
    unsafe impl Graph for Noted {
        unsafe fn set(&mut self, index: usize, command: &Command) -> Result<bool> {
            self.bytes[index] = byte(command);
            self.notes.note(Set(index, byte(command)));
            Ok(!self.notes.refuses_changes)
        }
        unsafe fn run(&mut self) -> Result<()> {
            self.notes.note(RunGraph(self.bytes.clone()));
            Ok(())
        }
    }

    fn fill(byte: u8) -> Command {
        Command::Fill { to: 16, byte, bytes: 1 }
    }

    /// Pushes and reads.
    fn step(queue: &Queue, commands: &[Command]) {
        for command in commands {
            // SAFETY: Nothing is touched.
            unsafe { queue.push(command.clone()) }.unwrap();
        }
        // SAFETY: As above.
        unsafe { queue.read(16, &mut []) }.unwrap();
    }

    #[test]
    fn what_comes_again_is_a_graph_with_what_differs_changed() {
        let notes = Notes::default();
        let queue = Queue::new(Arc::new(notes.clone()));
        step(&queue, &[fill(1), fill(2)]);
        assert_eq!(notes.take(), [Run(1), Run(2), Read]);
        step(&queue, &[fill(1), fill(3)]);
        assert_eq!(notes.take(), [Asked::Graph(2), RunGraph(vec![1, 3]), Read]);
        step(&queue, &[fill(1), fill(3)]);
        assert_eq!(notes.take(), [RunGraph(vec![1, 3]), Read]);
        step(&queue, &[fill(4), fill(3)]);
        assert_eq!(notes.take(), [Set(0, 4), RunGraph(vec![4, 3]), Read]);
        // Other commands, or as many others, are another piece; the first is still there.
        let copy = Command::Copy { to: 16, from: 32, bytes: 1 };
        step(&queue, &[fill(4), copy]);
        step(&queue, &[fill(4)]);
        step(&queue, &[fill(4), fill(3)]);
        let expected = [Run(4), Run(255), Read, Run(4), Read, RunGraph(vec![4, 3]), Read];
        assert_eq!(notes.take(), expected);
        step(&queue, &[]);
        assert_eq!(notes.take(), [Read]);
    }

    #[test]
    fn a_long_step_is_pieces_of_their_own() {
        let notes = Notes::default();
        let queue = Queue::new(Arc::new(notes.clone()));
        let commands: Vec<Command> = (0..2 * PIECE + 1).map(|i| fill((i / PIECE) as u8)).collect();
        step(&queue, &commands);
        let runs: Vec<Asked> = commands.iter().map(|command| Run(byte(command))).collect();
        assert_eq!(notes.take(), [runs, vec![Read]].concat());
        step(&queue, &commands);
        assert_eq!(notes.take().iter().filter(|a| matches!(a, Asked::Graph(_))).count(), 3);
        step(&queue, &commands);
        let pieces = [vec![0; PIECE], vec![1; PIECE], vec![2]].map(RunGraph);
        assert_eq!(notes.take(), [&pieces[..], &[Read]].concat());
    }

    #[test]
    fn a_change_that_is_refused_makes_a_new_graph() {
        let notes = Notes { refuses_changes: true, ..Notes::default() };
        let queue = Queue::new(Arc::new(notes.clone()));
        for byte in 0..3 {
            step(&queue, &[fill(byte)]);
        }
        let first = [Run(0), Read, Asked::Graph(1), RunGraph(vec![1]), Read];
        let then = [Set(0, 2), Asked::Graph(1), RunGraph(vec![2]), Read];
        assert_eq!(notes.take(), [&first[..], &then].concat());
    }

    #[test]
    fn without_graphs_commands_run_as_they_come() {
        let notes = Notes { refuses_graphs: true, ..Notes::default() };
        let queue = Queue::new(Arc::new(notes.clone()));
        for byte in 0..3 {
            step(&queue, &[fill(byte)]);
        }
        // One attempt, whose commands run all the same.
        assert_eq!(notes.take(), [Run(0), Read, Asked::Graph(1), Run(1), Read, Run(2), Read]);
        // SAFETY: Nothing is touched.
        unsafe { queue.push(fill(3)) }.unwrap();
        assert_eq!(notes.take(), [Run(3)]);
        assert!(queue.has_run(queue.n_pushed()));
    }

    #[test]
    fn only_some_pieces_are_remembered() {
        let notes = Notes::default();
        let queue = Queue::new(Arc::new(notes.clone()));
        let one = [fill(7)];
        (0..2).for_each(|_| step(&queue, &one));
        for n in 2..=MAX_PIECES {
            step(&queue, &vec![fill(0); n]);
            step(&queue, &one);
        }
        notes.take();
        step(&queue, &vec![fill(0); 2]); // There is room for all so far.
        assert_eq!(notes.take()[0], Asked::Graph(2));
        (0..3).for_each(|n| {
            step(
                &queue,
                &[vec![fill(0); n], vec![Command::Copy { to: 16, from: 32, bytes: 1 }]].concat(),
            )
        });
        notes.take();
        step(&queue, &one);
        assert_eq!(notes.take(), [RunGraph(vec![7]), Read]);
        step(&queue, &vec![fill(0); 3]);
        assert_eq!(notes.take()[0], Run(0), "forgotten");
        assert!(queue.state().pieces.len() <= MAX_PIECES);
    }
}
