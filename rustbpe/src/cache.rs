//! Which ids a chunk has become before: text repeats its words, and finding one again is much cheaper than merging.
//!
//! A chunk of up to 15 bytes is its own key, one 128-bit number, and lies with its ids in half a cache line: most of
//! text costs one multiplication, one line and two comparisons a chunk. Longer ones are in an ordinary map.

use std::ops::Range;

use rustc_hash::FxHashMap;

/// The longest chunk that fits into a key beside its length.
pub const SHORT: usize = 15;

/// How many ids lie beside a key.
pub const INLINE: usize = 3;

/// What the map may hold, keys and ids, before it is emptied.
const MAP_BYTES: usize = 4 << 20;

/// No longer chunks in the map: they hardly come back, and a text without borders must not fill it.
const LONGEST: usize = 128;

/// The ids of a short chunk: `ids[..len]`. Key 0 is free, since a key has its length, at least 1, in the top byte.
#[derive(Clone, Copy, Default)]
pub struct Entry {
    key: u128,
    pub ids: [u32; INLINE],
    pub len: u32,
}

/// Two entries that share a hash: one cache line. The one used first, or put in last, comes first.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Bucket([Entry; 2]);

pub struct Cache {
    buckets: Vec<Bucket>,
    map: FxHashMap<Box<[u8]>, Box<[u32]>>,
    map_bytes: usize,
}

/// The bytes of a short chunk with its length on top, so that chunks that end in zeros differ.
#[inline(always)]
pub fn key(text: &[u8], chunk: &Range<usize>) -> u128 {
    let len = chunk.len();
    let bytes = match text.get(chunk.start..chunk.start + 16) {
        Some(block) => u128::from_le_bytes(block.try_into().expect("16 bytes")) & MASKS[len],
        None => near_end(&text[chunk.clone()]),
    };
    bytes | (len as u128) << 120
}

/// Both halves of the 128-bit product of both halves: one multiplication mixes all bits.
#[inline(always)]
pub fn hash(key: u128) -> u64 {
    let low = key as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let high = (key >> 64) as u64 ^ 0xd1b5_4a32_d192_ed03;
    let product = u128::from(low) * u128::from(high);
    product as u64 ^ (product >> 64) as u64
}

/// The lowest so many bytes of a key.
const MASKS: [u128; 16] = {
    let mut masks = [0; 16];
    let mut len = 1;
    while len < 16 {
        masks[len] = masks[len - 1] << 8 | 0xff;
        len += 1;
    }
    masks
};

#[cold]
fn near_end(chunk: &[u8]) -> u128 {
    let mut block = [0; 16];
    block[..chunk.len()].copy_from_slice(chunk);
    u128::from_le_bytes(block)
}

impl Cache {
    /// As many entries as a vocabulary of this size makes worth while, within 0.25 and 8 MB.
    pub fn new(vocab_size: usize) -> Self {
        let buckets = (2 * vocab_size).next_power_of_two().clamp(1 << 12, 1 << 17);
        Self { buckets: vec![Bucket::default(); buckets], map: FxHashMap::default(), map_bytes: 0 }
    }

    #[inline(always)]
    fn bucket(&self, key: u128) -> usize {
        hash(key) as usize & (self.buckets.len() - 1)
    }

    #[inline(always)]
    pub fn get(&self, key: u128) -> Option<&Entry> {
        let Bucket(ways) = &self.buckets[self.bucket(key)];
        let entry = &ways[usize::from(ways[1].key == key)];
        (entry.key == key).then_some(entry)
    }

    /// Keeps a short chunk of at most INLINE ids; of the two that were in its place, the later one goes.
    pub fn put(&mut self, key: u128, ids: &[u32]) {
        let at = self.bucket(key);
        let mut entry = Entry { key, len: ids.len() as u32, ..Entry::default() };
        entry.ids[..ids.len()].copy_from_slice(ids);
        let Bucket([first, second]) = &mut self.buckets[at];
        *second = std::mem::replace(first, entry);
    }

    /// Keeps a short chunk if there is room.
    pub fn put_if_free(&mut self, key: u128, ids: &[u32]) {
        let at = self.bucket(key);
        if self.buckets[at].0[1].key == 0 {
            self.put(key, ids);
        }
    }

    pub fn get_long(&self, chunk: &[u8]) -> Option<&[u32]> {
        self.map.get(chunk).map(|ids| &ids[..])
    }

    pub fn put_long(&mut self, chunk: &[u8], ids: &[u32]) {
        if chunk.len() > LONGEST {
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
