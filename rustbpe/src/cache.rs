//! Which ids a chunk has become before: text repeats its words, and finding one again is much cheaper than merging.
//!
//! A chunk of up to 15 bytes lies with its ids in half a cache line: most of text costs one multiplication, one line and
//! two comparisons a chunk. Longer ones, and those of many ids, are in an ordinary map. One thread uses a cache at a
//! time, so nothing is locked.

use rustc_hash::FxHashMap;

use crate::chunk::Key;

/// How many ids lie beside a key.
pub const INLINE_IDS: usize = 3;

/// 8 MB of them. Half as many lose a tenth of the speed on prose with a vocabulary of 32,768, twice as many gain little.
const BUCKETS: usize = 1 << 17;

/// What the map may hold, keys and ids, before it is emptied.
const MAP_BYTES: usize = 4 << 20;

/// No longer chunks in the map: they hardly come back, and a text without borders must not fill it.
const MAX_MAP_CHUNK: usize = 128;

/// The ids of a short chunk: `ids[..len]`. Free where the key is 0.
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

/// Two entries that share a hash: one cache line. The later one comes first.
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
        let buckets = vec![Bucket::default(); BUCKETS].try_into().ok().expect("as many as asked for");
        Self { buckets, map: FxHashMap::default(), map_bytes: 0 }
    }
}

impl Cache {
    /// Where a key belongs. Asks for that place, to have it at hand when `get` comes.
    #[inline(always)]
    pub fn prefetch(&self, key: Key) -> usize {
        let bucket = key.hash() % BUCKETS;
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, which reads nothing as far as the program can tell; every x86-64 has it.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>((&raw const self.buckets[bucket]).cast());
        }
        bucket
    }

    /// What lies at its `place` for this key. Both ways are compared without a branch, which would be mispredicted.
    #[inline(always)]
    pub fn get(&self, bucket: usize, key: Key) -> Option<&Entry> {
        let Bucket(ways) = &self.buckets[bucket % BUCKETS];
        let entry = &ways[usize::from(ways[1].key == key)];
        (entry.key == key).then_some(entry)
    }

    /// Keeps a short chunk of at most INLINE_IDS ids; of the two that were in its place, the one behind goes.
    pub fn put(&mut self, key: Key, ids: &[u32]) {
        let Bucket([first, second]) = &mut self.buckets[key.hash() % BUCKETS];
        *second = std::mem::replace(first, Entry::new(key, ids));
    }

    /// Keeps a short chunk if there is room.
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
        let bytes = chunk.len() + 4 * ids.len() + 64; // with what an entry and two allocations take
        if self.map_bytes + bytes > MAP_BYTES {
            self.map.clear();
            self.map_bytes = 0;
        }
        self.map_bytes += bytes;
        self.map.insert(chunk.into(), ids.into());
    }
}
