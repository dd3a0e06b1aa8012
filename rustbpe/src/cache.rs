//! Caches the ids of chunks that were encoded before. In: a chunk. Out: its ids, if it is cached. A chunk with at most
//! 15 bytes and at most three ids takes half a cache line. All other chunks go to an ordinary hash map. Only one thread
//! uses a cache at a time, so it needs no lock.

use rustc_hash::FxHashMap;

use crate::chunk::Key;

/// The maximum number of ids in an entry.
pub const INLINE_IDS: usize = 3;

/// The number of buckets, which take 8 MB in all. With a vocabulary of 32,768 tokens, half as many buckets make the
/// encoding of prose 10% slower. Twice as many hardly make it faster.
const BUCKETS: usize = 1 << 17;

/// The maximum memory for the map's keys and ids, in bytes. The map is emptied before it exceeds this limit.
const MAP_BYTES: usize = 4 << 20;

/// The maximum length in bytes of a chunk in the map. Longer chunks hardly ever recur, and a text that is one long
/// chunk would fill the map.
const MAX_MAP_CHUNK: usize = 128;

/// A short chunk and its ids, `ids[..len]`. The key 0 marks a free entry.
#[derive(Clone, Copy, Default)]
pub struct Entry {
    key: Key,
    pub ids: [u32; INLINE_IDS],
    pub len: u32,
}

impl Entry {
    fn new(key: Key, ids: &[u32]) -> Self {
        let mut entry = Self { key, ids: [0; INLINE_IDS], len: ids.len() as u32 };
        entry.ids[..ids.len()].copy_from_slice(ids);
        entry
    }
}

/// Two entries in one cache line. `put` stores a new entry at the front.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Bucket([Entry; 2]);

pub struct Cache {
    buckets: Box<[Bucket; BUCKETS]>,
    map: FxHashMap<Box<[u8]>, Box<[u32]>>,
    map_bytes: usize,
}

impl Default for Cache {
    fn default() -> Self {
        let buckets =
            vec![Bucket::default(); BUCKETS].try_into().ok().expect("the vector should have BUCKETS elements");
        Self { buckets, map: FxHashMap::default(), map_bytes: 0 }
    }
}

impl Cache {
    /// Returns the index of a key's bucket. Also starts to load the bucket from memory, so that a later `get` need not
    /// wait for it.
    #[inline(always)]
    pub fn prefetch(&self, key: Key) -> usize {
        let bucket = key.hash() % BUCKETS;
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch is only a hint and cannot fault, and every x86-64 processor has the instruction.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>((&raw const self.buckets[bucket]).cast());
        }
        bucket
    }

    /// The entry of `key` in its `bucket`. Chooses between the two entries without a branch, because the processor
    /// would often mispredict it.
    #[inline(always)]
    pub fn get(&self, bucket: usize, key: Key) -> Option<&Entry> {
        let Bucket(ways) = &self.buckets[bucket % BUCKETS];
        let entry = &ways[usize::from(ways[1].key == key)];
        (entry.key == key).then_some(entry)
    }

    /// Stores a short chunk with at most INLINE_IDS ids as the first entry of its bucket. The first entry becomes the
    /// second, and the second is dropped.
    pub fn put(&mut self, key: Key, ids: &[u32]) {
        let Bucket([first, second]) = &mut self.buckets[key.hash() % BUCKETS];
        *second = std::mem::replace(first, Entry::new(key, ids));
    }

    /// Stores a short chunk with at most INLINE_IDS ids if its bucket has a free entry.
    pub fn put_if_free(&mut self, key: Key, ids: &[u32]) {
        let Bucket(ways) = &mut self.buckets[key.hash() % BUCKETS];
        if let Some(free) = ways.iter_mut().find(|entry| entry.key == Key::default()) {
            *free = Entry::new(key, ids);
        }
    }

    pub fn get_long(&self, chunk: &[u8]) -> Option<&[u32]> {
        self.map.get(chunk).map(|ids| &ids[..])
    }

    pub fn put_long(&mut self, chunk: &[u8], ids: &[u32]) {
        if chunk.len() > MAX_MAP_CHUNK {
            return;
        }
        let bytes = chunk.len() + 4 * ids.len() + 64; // 64 for the map's entry and two allocations
        if self.map_bytes + bytes > MAP_BYTES {
            self.map.clear();
            self.map_bytes = 0;
        }
        self.map_bytes += bytes;
        self.map.insert(chunk.into(), ids.into());
    }
}
