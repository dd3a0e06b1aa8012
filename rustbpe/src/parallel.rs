//! Distributes texts over threads. In: texts, one by one. Out: the state that each thread has built from its share.
//! Each call starts new threads, because a pool of threads would not survive a fork, and data loaders fork.

use std::ops::Range;
use std::sync::mpsc::{TrySendError, sync_channel};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread;

use crate::split::Splitter;

/// The number of cores that this process may use.
static CORES: LazyLock<usize> = LazyLock::new(|| thread::available_parallelism().map_or(1, usize::from));

/// The maximum number of threads, even if the caller asks for more. More threads would never help.
const MAX_THREADS: usize = 1024;

/// In the size of a piece, each text counts as its bytes plus this number. Otherwise a piece of empty texts would never
/// be full.
pub const TEXT_OVERHEAD: usize = 64;

/// How work is distributed over threads.
#[derive(Clone, Copy)]
pub struct Plan {
    /// The maximum number of threads, including the calling thread.
    pub threads: usize,
    /// The approximate size of a piece, in bytes of text.
    pub piece_bytes: usize,
}

impl Plan {
    /// Uses one thread per core if `threads` is None. The work on a piece takes a fraction of a millisecond. The piece
    /// fits into a core's cache together with its ids.
    pub fn new(threads: Option<usize>) -> Self {
        Self { threads: threads.unwrap_or(*CORES).min(MAX_THREADS), piece_bytes: 1 << 17 }
    }
}

/// Takes items one by one and passes them to the threads.
pub type Sender<'s, Item> = dyn FnMut(Item) + Send + 's;

/// Takes texts one by one. Returns false after a failure, when no more texts are wanted.
pub type TextSink<'s, T> = dyn FnMut(T) -> bool + Send + 's;

/// Passes every text of an iterator to the sink, until the sink returns false.
pub fn feed_all<T>(texts: impl IntoIterator<Item = T>) -> impl FnOnce(&mut TextSink<T>) -> Result<(), String> {
    |sink| {
        texts.into_iter().all(sink);
        Ok(())
    }
}

/// Folds the items that `produce` sends, on up to `threads` threads. Each thread makes its own state with `init` and
/// folds items into this state with `step`. Returns the result of `produce`, and the states in no particular order.
///
/// The calling thread is one of them. It runs `produce`, but also runs `step` when the queue is full and after the last
/// item. A single item starts no other thread. The queue holds up to four items per thread.
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
                // If the system cannot start a thread, the calling thread does the work.
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

/// Work for one thread: several consecutive texts, or a part of a large text. Texts are numbered from 0.
pub enum Piece<T> {
    Texts { first: usize, texts: Vec<T> },
    Part { number: usize, text: Arc<T>, bytes: Range<usize> },
}

impl<T: AsRef<str>> Piece<T> {
    /// A key that sorts pieces in the order of their texts.
    pub fn position(&self) -> (usize, usize) {
        match self {
            Piece::Texts { first, .. } => (*first, 0),
            Piece::Part { number, bytes, .. } => (*number, bytes.start),
        }
    }

    /// The texts in the piece, each with its number. If the piece is a part of a text, yields only this part.
    pub fn texts(&self) -> impl Iterator<Item = (usize, &str)> {
        let (first, texts, part) = match self {
            Piece::Texts { first, texts } => (*first, &texts[..], None),
            Piece::Part { number, text, bytes } => (0, &[][..], Some((*number, &(**text).as_ref()[bytes.clone()]))),
        };
        texts.iter().enumerate().map(move |(i, text)| (first + i, text.as_ref())).chain(part)
    }
}

/// Groups small texts into pieces, and cuts a large text into several pieces.
pub struct Pieces<'s, T> {
    splitter: &'s Splitter,
    piece_bytes: usize,
    texts: Vec<T>,
    bytes: usize,
    /// The number of texts added so far.
    pub num_texts: usize,
}

impl<'s, T: AsRef<str> + Send + Sync> Pieces<'s, T> {
    /// Each piece has about `piece_bytes` bytes of text.
    pub fn new(splitter: &'s Splitter, piece_bytes: usize) -> Self {
        Self { splitter, piece_bytes, texts: vec![], bytes: 0, num_texts: 0 }
    }

    /// Adds the next text, and sends the pieces that are complete.
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

    /// Sends the texts that have not been sent yet.
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
    fn pieces_of_empty_texts_are_sent_too() {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let mut pieces = Pieces::new(&splitter, 1 << 17);
        let mut sent = vec![];
        let mut send = |piece: Piece<&str>| sent.push(piece.texts().count());
        (0..10_000).for_each(|_| pieces.add("", &mut send));
        pieces.flush(&mut send);
        assert!(sent.len() > 4 && sent.iter().sum::<usize>() == 10_000);
    }

    #[test]
    fn every_item_is_done_once_on_at_most_the_given_threads() {
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
