//! The threads of a backend: rayon's, kept awake from one operation to the next.
//!
//! rayon puts a thread to sleep some microseconds after its last work, and to wake it costs tens: as much as a small
//! operation takes, hundreds of times a token. So while operations follow each other, the threads that have nothing to do look
//! for work themselves for [`PATIENCE`], and offer their core to other threads and processes every few microseconds. The one
//! that has forked waits in the same way for those that are at their last task ([`run_tasks`]).

use std::{
    cell::Cell,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rayon::{Scope, ThreadPool, ThreadPoolBuilder, Yield};

use crate::error::{Error, Result};

/// How long a thread looks for work before it may sleep.
const PATIENCE: Duration = Duration::from_micros(500);
/// Pauses between two looks, about a microsecond.
const PAUSES: usize = 16;
/// Looks between two offers of the core.
const LOOKS_AT_ONCE: usize = 8;

thread_local! {
    /// Scopes that this thread is in.
    static SCOPES: Cell<usize> = const { Cell::new(0) };
    /// Whether it looks for work, or does what it found.
    static LOOKS: Cell<bool> = const { Cell::new(false) };
}

/// Counts a scope of this thread while it lives.
struct Inside<'a>(&'a Threads);

impl<'a> Inside<'a> {
    fn enter(threads: &'a Threads) -> Self {
        SCOPES.set(SCOPES.get() + 1);
        if SCOPES.get() == 1 {
            threads.callers.fetch_add(1, Ordering::Relaxed);
        }
        Self(threads)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        SCOPES.set(SCOPES.get() - 1);
        if SCOPES.get() == 0 {
            self.0.callers.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

pub(super) struct Threads {
    pool: ThreadPool,
    /// Threads in a scope.
    callers: AtomicUsize,
    /// Threads that look for work, or are about to.
    looking: Arc<AtomicUsize>,
}

impl Threads {
    /// `n` threads (0: one a core).
    ///
    /// # Errors
    /// If they cannot be started.
    pub(super) fn start(n: usize) -> Result<Self> {
        let pool = ThreadPoolBuilder::new().num_threads(n).thread_name(|i| format!("polytape-{i}"));
        let pool = pool.build();
        let pool = pool.map_err(|error| Error::Device(format!("cannot start threads: {error}")))?;
        Ok(Self { pool, callers: AtomicUsize::new(0), looking: Arc::default() })
    }

    pub(super) fn n(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work` on one of the threads, and what it forks on all of them.
    pub(super) fn scope<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        let (mut work, mut result) = (Some(work), None);
        self.enter(&mut || result = work.take().map(|work| work()));
        result.expect("the work has run")
    }

    /// [`Threads::scope`], compiled once for all works.
    fn enter(&self, work: &mut (dyn FnMut() + Send)) {
        self.pool.install(|| {
            let _inside = Inside::enter(self);
            self.rouse();
            work();
        });
    }

    /// Runs `work` once on every thread.
    pub(super) fn on_each<R: Send>(&self, work: impl Fn(usize) -> R + Sync) -> Vec<R> {
        self.pool.broadcast(|context| work(context.index()))
    }

    /// Has the other threads look for work, if none does.
    ///
    /// Only between the operations of a single caller: nothing is forked then, so each of them begins at the bottom of its
    /// stack. Above a part that waits for another thread, it would keep that part from going on.
    fn rouse(&self) {
        let (others, relaxed) = (self.n() - 1, Ordering::Relaxed);
        // A scope may be what this thread found.
        let own = usize::from(LOOKS.get());
        if others == 0
            || self.callers.load(relaxed) != 1
            || self.looking.load(relaxed) > own
            || self.looking.compare_exchange(own, own + others, relaxed, relaxed).is_err()
        {
            return;
        }
        let (caller, looking) = (rayon::current_thread_index(), Arc::clone(&self.looking));
        self.pool.spawn_broadcast(move |context| {
            if Some(context.index()) != caller {
                LOOKS.set(true);
                look_for_work();
                LOOKS.set(false);
                looking.fetch_sub(1, relaxed);
            }
        });
    }
}

/// Does what other threads have left to do, until there has been nothing for a while. Not for ever: a thread that took another
/// caller's scope while it waited counts as one caller, so there may be a part below after all.
fn look_for_work() {
    let start = Instant::now();
    let mut last = start;
    while last.elapsed() < PATIENCE && start.elapsed() < 20 * PATIENCE {
        for _ in 0..LOOKS_AT_ONCE {
            if rayon::yield_now() == Some(Yield::Executed) {
                last = Instant::now();
            } else {
                (0..PAUSES).for_each(|_| std::hint::spin_loop());
            }
        }
        thread::yield_now();
    }
}

/// Runs each task once, on all threads. Each has a share of neighbours, which often read the same, and goes through it in
/// order; who is done takes the last one of another's share. So large tasks belong in front, and none waits for long.
pub(super) fn run_tasks<T: Send>(tasks: impl IntoIterator<Item = T>, run: impl Fn(T) + Sync) {
    let tasks: Vec<_> = tasks.into_iter().map(|task| Mutex::new(Some(task))).collect();
    run_each(tasks.len(), &|i| {
        let task = tasks[i].lock().unwrap_or_else(PoisonError::into_inner).take();
        run(task.expect("each task runs once"));
    });
}

/// [`run_tasks`] of the numbers below `n_tasks`, compiled once for all tasks.
fn run_each(n_tasks: usize, run: &(dyn Fn(usize) + Sync)) {
    let n = rayon::current_num_threads().min(n_tasks);
    if n < 2 {
        return (0..n_tasks).for_each(run);
    }
    let share = |i| Mutex::new(n_tasks * i / n..n_tasks * (i + 1) / n);
    let fork = Fork { shares: (0..n).map(share).collect(), run, busy: AtomicUsize::new(0) };
    rayon::scope(|scope| fork.join(scope, 0));
}

/// [`run_each`].
struct Fork<'a> {
    shares: Vec<Mutex<Range<usize>>>,
    run: &'a (dyn Fn(usize) + Sync),
    /// Threads at work but for the one that has forked.
    busy: AtomicUsize,
}

impl Fork<'_> {
    /// What the thread number `i` to join does: it calls two more, works, and the first one waits for the others.
    fn join<'s>(&'s self, scope: &Scope<'s>, i: usize) {
        let n = self.shares.len();
        for next in [2 * i + 1, 2 * i + 2].into_iter().filter(|&next| next < n) {
            scope.spawn(move |scope| self.join(scope, next));
        }
        // The same share in each operation: what it reads is often what this thread has written.
        let own = rayon::current_thread_index().unwrap_or(i) % n;
        if i > 0 {
            let _busy = Busy::enter(&self.busy);
            self.work(own);
            return;
        }
        self.work(own);
        let start = Instant::now();
        // rayon would sleep after a few microseconds. Whom nobody has called yet finds nothing left, and need not come.
        while self.busy.load(Ordering::Acquire) > 0 && start.elapsed() < PATIENCE {
            for _ in 0..LOOKS_AT_ONCE * PAUSES {
                if self.busy.load(Ordering::Acquire) == 0 {
                    return;
                }
                std::hint::spin_loop();
            }
            thread::yield_now();
        }
    }

    fn work(&self, own: usize) {
        let n = self.shares.len();
        let share = |i: usize| self.shares[i % n].lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut task = share(own).next();
            for other in own + 1..own + n {
                task = task.or_else(|| share(other).next_back());
            }
            match task {
                Some(task) => (self.run)(task),
                None => return,
            }
        }
    }
}

/// Counts a thread that works, to the end or to a panic.
struct Busy<'a>(&'a AtomicUsize);

impl<'a> Busy<'a> {
    fn enter(busy: &'a AtomicUsize) -> Self {
        busy.fetch_add(1, Ordering::Relaxed);
        Self(busy)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    /// Scopes of several callers beside and inside each other, with pauses in which threads fall asleep.
    #[test]
    fn scopes_of_many_callers_end() {
        for n in [1, 2, 5] {
            let threads = &Threads::start(n).expect("threads start");
            assert_eq!(threads.n(), n);
            thread::scope(|callers| {
                for caller in 0..4 {
                    callers.spawn(move || {
                        for round in 0..300_u64 {
                            if round % 100 == caller {
                                thread::sleep(PATIENCE * 3);
                            }
                            let sum = threads.scope(|| {
                                let inner =
                                    threads.scope(|| (0..50 + round).into_par_iter().sum::<u64>());
                                inner + (0..round).into_par_iter().sum::<u64>()
                            });
                            assert_eq!(
                                sum,
                                (49 + round) * (50 + round) / 2
                                    + round.saturating_sub(1) * round / 2
                            );
                        }
                    });
                }
            });
            while threads.looking.load(Ordering::Relaxed) > 0 {
                thread::sleep(PATIENCE); // For ever, if one was miscounted.
            }
        }
    }

    /// From one caller and from several, forked once more inside, few tasks and many: each task runs once.
    #[test]
    fn each_task_runs_once() {
        let sum = |tasks: std::ops::Range<usize>| {
            let sum = AtomicUsize::new(0);
            run_tasks(tasks, |i| {
                run_tasks([i, 1], |j| {
                    sum.fetch_add(j, Ordering::Relaxed);
                });
            });
            sum.into_inner()
        };
        for n in [1, 2, 3, 8] {
            let threads = &Threads::start(n).expect("threads start");
            thread::scope(|callers| {
                for _ in 0..3 {
                    callers.spawn(|| {
                        for n_tasks in (0..200).chain([5000]) {
                            let found = threads.scope(|| sum(0..n_tasks));
                            assert_eq!(found, n_tasks * n_tasks.saturating_sub(1) / 2 + n_tasks);
                        }
                    });
                }
            });
        }
        assert_eq!(sum(0..4), 10); // rayon's own threads.
    }

    #[test]
    fn a_task_that_panics_stops_the_caller() {
        let threads = Threads::start(3).expect("threads start");
        for bad in [0, 7, 99] {
            let work = || threads.scope(|| run_tasks(0..100, |i| assert!(i != bad, "i is {bad}")));
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err());
            let done = AtomicUsize::new(0);
            let count = |_| {
                done.fetch_add(1, Ordering::Relaxed);
            };
            threads.scope(|| run_tasks(0..100, count));
            assert_eq!(done.into_inner(), 100);
        }
    }

    #[test]
    fn a_panic_leaves_the_scope() {
        let threads = Threads::start(2).expect("threads start");
        for _ in 0..3 {
            let work =
                || threads.scope(|| (0..9).into_par_iter().for_each(|i| assert!(i < 8, "i is 8")));
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err());
            assert_eq!(threads.on_each(|_| SCOPES.get()), [0, 0]);
        }
    }
}
