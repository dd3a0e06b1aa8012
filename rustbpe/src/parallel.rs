//! Texts shared out among threads.
//!
//! Plain threads that end with the call: a pool would not survive a fork, and data loaders fork.

use std::ops::Range;
use std::sync::mpsc::{TrySendError, sync_channel};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread;

use crate::split::Splitter;

/// As many threads as the machine has cores for this process.
static CORES: LazyLock<usize> = LazyLock::new(|| thread::available_parallelism().map_or(1, usize::from));

/// More help nobody, whatever a caller asks for.
const MAX_THREADS: usize = 1024;

/// What a text weighs beside its bytes, so that a piece of empty ones ends too.
pub const TEXT_OVERHEAD: usize = 64;

/// How work is shared out.
#[derive(Clone, Copy)]
pub struct Plan {
    /// At most so many at once, the calling one included.
    pub threads: usize,
    /// Bytes of text worth handing over.
    pub piece_bytes: usize,
}

impl Plan {
    /// One thread a core where `threads` is None. A piece is a fraction of a millisecond's work, and small enough to
    /// lie in a core's cache with its ids.
    pub fn new(threads: Option<usize>) -> Self {
        Self { threads: threads.unwrap_or(*CORES).min(MAX_THREADS), piece_bytes: 1 << 17 }
    }
}

/// Takes items one by one and hands them to threads.
pub type Sender<'s, Item> = dyn FnMut(Item) + Send + 's;

/// Takes texts one by one; false: no more are wanted, for something has failed.
pub type TextSink<'s, T> = dyn FnMut(T) -> bool + Send + 's;

/// Hands over what an iterator yields.
pub fn feed_all<T>(texts: impl IntoIterator<Item = T>) -> impl FnOnce(&mut TextSink<T>) -> Result<(), String> {
    |take| {
        texts.into_iter().all(take);
        Ok(())
    }
}

/// Runs `step` on every item that `produce` hands over, on `threads` threads, this one included. Each has a state of
/// its own from `start`; the states are returned in no particular order. This thread helps when the others cannot keep
/// up, and after the last item; a single item starts no thread. At most four items a thread wait.
pub fn parallel_fold<Item: Send, State: Send, R>(
    threads: usize,
    init: impl Fn() -> State + Sync,
    step: impl Fn(&mut State, Item) + Sync,
    produce: impl FnOnce(&mut Sender<Item>) -> R,
) -> (R, Vec<State>) {
    let (sender, receiver) = sync_channel(4 * threads);
    let receiver = Mutex::new(receiver);
    let next = || receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok();
    let work = || {
        let mut state = init();
        while let Some(item) = next() {
            step(&mut state, item);
        }
        state
    };
    thread::scope(|scope| {
        let mut own = init();
        let mut helpers = vec![];
        let mut first = true;
        let result = produce(&mut |item| {
            if !std::mem::take(&mut first) && helpers.len() + 1 < threads {
                // Where no thread can be had, this one does the work.
                helpers.extend(thread::Builder::new().spawn_scoped(scope, work));
            }
            if let Err(TrySendError::Full(item) | TrySendError::Disconnected(item)) = sender.try_send(item) {
                step(&mut own, item);
            }
        });
        drop(sender);
        while let Some(item) = next() {
            step(&mut own, item);
        }
        let join = |helper: thread::ScopedJoinHandle<_>| helper.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
        let mut states: Vec<State> = helpers.into_iter().map(join).collect();
        states.push(own);
        (result, states)
    })
}

/// Work for one thread: some neighbouring texts, or a part of a large one. Texts are numbered from 0.
pub enum Piece<T> {
    Texts { first: usize, texts: Vec<T> },
    Part { number: usize, text: Arc<T>, bytes: Range<usize> },
}

impl<T: AsRef<str>> Piece<T> {
    /// Pieces in this order are in the order of the texts.
    pub fn position(&self) -> (usize, usize) {
        match self {
            Piece::Texts { first, .. } => (*first, 0),
            Piece::Part { number, bytes, .. } => (*number, bytes.start),
        }
    }

    /// Each text, or part of one, with the number of its text.
    pub fn texts(&self) -> impl Iterator<Item = (usize, &str)> {
        let (first, texts, part) = match self {
            Piece::Texts { first, texts } => (*first, &texts[..], None),
            Piece::Part { number, text, bytes } => (0, &[][..], Some((*number, &(**text).as_ref()[bytes.clone()]))),
        };
        texts.iter().enumerate().map(move |(i, text)| (first + i, text.as_ref())).chain(part)
    }
}

/// Makes pieces of texts that come one after another.
pub struct Pieces<'s, T> {
    splitter: &'s Splitter,
    piece_bytes: usize,
    texts: Vec<T>,
    bytes: usize,
    /// How many texts have been added.
    pub num_texts: usize,
}

impl<'s, T: AsRef<str> + Send + Sync> Pieces<'s, T> {
    /// A piece has about `piece_bytes` bytes.
    pub fn new(splitter: &'s Splitter, piece_bytes: usize) -> Self {
        Self { splitter, piece_bytes, texts: vec![], bytes: 0, num_texts: 0 }
    }

    pub fn add(&mut self, text: T, send: &mut Sender<Piece<T>>) {
        let len = text.as_ref().len();
        if len >= 2 * self.piece_bytes {
            self.flush(send);
            let text = Arc::new(text);
            for bytes in self.splitter.parts((*text).as_ref(), self.piece_bytes) {
                send(Piece::Part { number: self.num_texts, text: text.clone(), bytes });
            }
            self.num_texts += 1;
            return;
        }
        self.texts.push(text);
        self.bytes += len + TEXT_OVERHEAD;
        self.num_texts += 1;
        if self.bytes >= self.piece_bytes {
            self.flush(send);
        }
    }

    /// Sends what is left.
    pub fn flush(&mut self, send: &mut Sender<Piece<T>>) {
        if !self.texts.is_empty() {
            let first = self.num_texts - self.texts.len();
            send(Piece::Texts { first, texts: std::mem::take(&mut self.texts) });
            self.bytes = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::GPT4_PATTERN;

    #[test]
    fn pieces_of_empty_texts_end_too() {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let mut pieces = Pieces::new(&splitter, 1 << 17);
        let mut sent = vec![];
        let mut send = |piece: Piece<&str>| sent.push(piece.texts().count());
        (0..10_000).for_each(|_| pieces.add("", &mut send));
        pieces.flush(&mut send);
        assert!(sent.len() > 4 && sent.iter().sum::<usize>() == 10_000);
    }

    #[test]
    fn every_item_is_done_once_on_at_most_so_many_threads() {
        for threads in 1..6 {
            for items in [0, 1, 2, 3, 10, 1000] {
                let (sent, states) = parallel_fold(
                    threads,
                    std::vec::Vec::new,
                    |done: &mut Vec<usize>, item| done.push(item),
                    |send| {
                        (0..items).for_each(&mut *send);
                        items
                    },
                );
                assert!(states.len() <= threads && (items > 1 || states.len() == 1));
                let mut done: Vec<usize> = states.concat();
                done.sort_unstable();
                assert_eq!((sent, done), (items, (0..items).collect()));
            }
        }
    }
}
