//! A few threads that share a queue of work, and live as long as it.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use crate::sys::signals::without_signals;

/// So much may wait: items, and what they cost together.
const MOST_WAITING: usize = 512;
const MOST_COST: usize = 16 << 20;
/// How many connections a thread takes at once, so that it need not come back for each.
const HANDFUL: usize = 16;
/// So few need no other thread: starting one takes longer than they do.
const FEW: usize = 8;
/// How many items must wait before another thread is worth starting.
const WORTH_A_THREAD: usize = 32;
/// More threads than this have not been seen to help.
const MOST_THREADS: usize = 8;

/// What threads need for their work, one of each for every thread at a time.
#[derive(Debug, Default)]
pub(super) struct Rack<Tools>(Mutex<Vec<Tools>>);

impl<Tools: Default> Rack<Tools> {
    fn take(&self) -> Tools {
        self.tools().pop().unwrap_or_default()
    }

    fn put_back(&self, tools: Tools) {
        self.tools().push(tools);
    }

    fn tools(&self) -> MutexGuard<'_, Vec<Tools>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does `work` for every item, on other threads but for the first few, and hands the outcomes to `finish`, one at a time. An item is not asked
/// for while others that `cost` much wait. Each thread takes the tools for its work from the rack, and puts them back in the end.
pub(super) fn run<T: Send, R, Tools: Default + Send>(
    rack: &Rack<Tools>,
    items: impl IntoIterator<Item = T>,
    cost: impl Fn(&T) -> usize + Sync,
    work: impl Fn(&mut Tools, T) -> R + Sync,
    finish: impl FnMut(R) + Send,
) {
    let (queue, finish) = (Queue::new(), Mutex::new(finish));
    let serve = || {
        let _close = CloseOnPanic(&queue);
        let mut tools = rack.take();
        while let Some(handful) = queue.take(&cost) {
            for item in handful {
                let outcome = work(&mut tools, item);
                finish.lock().unwrap_or_else(PoisonError::into_inner)(outcome);
            }
        }
        rack.put_back(tools);
    };
    let mut items = items.into_iter();
    let mut tools = rack.take();
    for item in items.by_ref().take(FEW) {
        let outcome = work(&mut tools, item);
        finish.lock().unwrap_or_else(PoisonError::into_inner)(outcome);
    }
    let mut items = items.peekable();
    if items.peek().is_none() {
        return rack.put_back(tools);
    }
    let most = most_threads();
    thread::scope(|scope| {
        let _close = Close(&queue);
        let mut threads = 0;
        for item in items {
            let Some(waiting) = queue.put(cost(&item), item) else { return };
            if threads == 0 || (threads < most && waiting > WORTH_A_THREAD) {
                let named = thread::Builder::new().name("soccr-bulk".into());
                match without_signals(|| named.spawn_scoped(scope, serve)) {
                    Ok(_) => threads += 1,
                    // Slower, but it goes on.
                    Err(_) if threads > 0 => {}
                    Err(_) => {
                        for item in queue.take(&cost).into_iter().flatten() {
                            let outcome = work(&mut tools, item);
                            finish.lock().unwrap_or_else(PoisonError::into_inner)(outcome);
                        }
                    }
                }
            }
        }
    });
    rack.put_back(tools);
}

/// As many threads as can run at a time. To find out takes reading the files of cgroups, so it is done once: more or fewer do no harm.
fn most_threads() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS))
}

struct Queue<T> {
    state: Mutex<State<T>>,
    filled: Condvar,
    emptied: Condvar,
}

struct State<T> {
    waiting: VecDeque<T>,
    cost: usize,
    closed: bool,
}

impl<T> Queue<T> {
    fn new() -> Self {
        let state = State { waiting: VecDeque::new(), cost: 0, closed: false };
        Self { state: Mutex::new(state), filled: Condvar::new(), emptied: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an item, when there is room. Returns how many wait; `None` where nobody takes them any more.
    fn put(&self, cost: usize, item: T) -> Option<usize> {
        let full = |state: &mut State<T>| {
            let full = state.waiting.len() >= MOST_WAITING || state.cost + cost > MOST_COST;
            // One that is too large by itself goes alone.
            full && !state.waiting.is_empty() && !state.closed
        };
        let mut state = self.emptied.wait_while(self.state(), full).unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        state.waiting.push_back(item);
        state.cost += cost;
        let waiting = state.waiting.len();
        drop(state);
        self.filled.notify_one();
        Some(waiting)
    }

    /// Takes some items, when there are any; `None` behind the last one.
    fn take(&self, cost: impl Fn(&T) -> usize) -> Option<Vec<T>> {
        let empty = |state: &mut State<T>| state.waiting.is_empty() && !state.closed;
        let mut state = self.filled.wait_while(self.state(), empty).unwrap_or_else(PoisonError::into_inner);
        // The other threads want something too.
        let count = state.waiting.len().div_ceil(2).min(HANDFUL);
        let handful: Vec<T> = state.waiting.drain(..count).collect();
        state.cost -= handful.iter().map(cost).sum::<usize>();
        drop(state);
        self.emptied.notify_one();
        (!handful.is_empty()).then_some(handful)
    }

    fn close(&self) {
        self.state().closed = true;
        self.filled.notify_all();
        self.emptied.notify_all();
    }
}

/// Lets the threads end, also where the source of items panics.
struct Close<'a, T>(&'a Queue<T>);

impl<T> Drop for Close<'_, T> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Lets whoever fills the queue go on, where a thread that empties it panics.
struct CloseOnPanic<'a, T>(&'a Queue<T>);

impl<T> Drop for CloseOnPanic<'_, T> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    fn squares(count: u64) -> Vec<u64> {
        let mut sink = Vec::new();
        run(&Rack::default(), 0..count, |_| MOST_COST / 100, |(), n| n * n, |square| sink.push(square));
        sink.sort_unstable();
        sink
    }

    #[test]
    fn everything_is_done_once() {
        for count in [0, 1, FEW as u64, 9, 31, 32, 33, 5000] {
            assert_eq!(squares(count), (0..count).map(|n| n * n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn outcomes_come_while_the_source_waits_for_them() {
        let (sender, receiver) = std::sync::mpsc::channel();
        // Each item is made only when the one before has come out.
        let items = (0..100).inspect(|n| assert!(*n == 0 || receiver.recv() == Ok(n - 1)));
        run(&Rack::default(), items, |_| 0, |(), n| n, |n| sender.send(n).unwrap());
    }

    #[test]
    fn an_item_that_costs_too_much_goes_alone() {
        let mut count = 0;
        run(&Rack::default(), 0..20, |_| 2 * MOST_COST, |(), _| (), |()| count += 1);
        assert_eq!(count, 20);
    }

    #[test]
    fn a_panic_ends_it_wherever_it_comes_from() {
        let everywhere: [fn(); 3] = [
            || run(&Rack::default(), 0..10_000, |_| 0, |(), n| assert!(n < 500), |()| {}),
            || run(&Rack::default(), 0..10_000, |_| 0, |(), n| n, |n| assert!(n < 500)),
            || run(&Rack::default(), (0..10_000).inspect(|n| assert!(*n < 500)), |_| 0, |(), n| n, |_| {}),
        ];
        for run in everywhere {
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
    }
}
