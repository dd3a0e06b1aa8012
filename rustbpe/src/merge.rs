//! Applies the learned merges to one chunk, in the order of learning. In: the bytes of a chunk. Out: its token ids.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The ids of two neighbouring tokens.
pub type Pair = (u32, u32);

/// Means "no token".
const NONE: u32 = u32::MAX;

/// Chunks of more bytes are merged with a heap, in O(n log n) time. Searching all pairs before each merge would take
/// quadratic time.
const HEAP_ABOVE: usize = 96;

/// Maps a pair of tokens to the id of the merged token. This id is also the rank of the merge, because ids are assigned
/// in the order of learning.
pub struct MergeTable {
    /// A hash table with open addressing, at most half full. An empty slot has the id NONE.
    slots: Vec<(Pair, u32)>,
    shift: u32,
    /// The ids of merged pairs of bytes, at `left * 256 + right`. Every chunk starts as single bytes, so these look-ups
    /// are frequent. With this table, each takes one load.
    bytes: Vec<u32>,
}

impl MergeTable {
    /// An empty table with room for `capacity` merges.
    pub fn new(capacity: usize) -> Self {
        let slots = (2 * capacity).next_power_of_two().max(2);
        Self { slots: vec![((0, 0), NONE); slots], shift: 64 - slots.ilog2(), bytes: vec![NONE; 1 << 16] }
    }

    /// Adds the merge of `pair` into `id`. May be called at most `capacity` times, each time with a different pair.
    pub fn insert(&mut self, pair: Pair, id: u32) {
        if pair.0 < 256 && pair.1 < 256 {
            self.bytes[(pair.0 << 8 | pair.1) as usize] = id;
        }
        let mut at = self.home(pair);
        while self.slots[at].1 != NONE {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at] = (pair, id);
    }

    /// The slot where the search for a pair begins.
    #[inline]
    fn home(&self, (left, right): Pair) -> usize {
        ((u64::from(left) << 32 | u64::from(right)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize
    }

    /// The id that `left` and `right` merge into, or NONE if they do not merge.
    #[inline]
    fn get(&self, left: u32, right: u32) -> u32 {
        let mut at = self.home((left, right));
        loop {
            let (pair, id) = self.slots[at];
            if pair == (left, right) || id == NONE {
                return id;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }

    #[inline]
    fn get_bytes(&self, left: u8, right: u8) -> u32 {
        self.bytes[usize::from(left) << 8 | usize::from(right)]
    }

    /// Writes the ids of one chunk to the beginning of `out`, and returns their number. `out` must have room for one id
    /// per byte.
    ///
    /// b"aaa" -> [256, 97], 2 (if "aa" is token 256)
    pub fn merge(&self, chunk: &[u8], out: &mut [u32]) -> usize {
        match chunk.len() {
            0..=16 => self.merge_short::<16>(chunk, out),
            17..=HEAP_ABOVE => self.merge_short::<HEAP_ABOVE>(chunk, out),
            _ => self.merge_long(chunk, out),
        }
    }

    /// Merges a chunk of up to `N` bytes. Before each merge, searches all pairs for the lowest rank. If several pairs
    /// have this rank, the leftmost is merged first.
    fn merge_short<const N: usize>(&self, chunk: &[u8], out: &mut [u32]) -> usize {
        // ranks[i] is the id that parts i and i + 1 would merge into.
        let mut ranks = [NONE; N];
        let mut len = chunk.len();
        for (part, &byte) in out.iter_mut().zip(chunk) {
            *part = u32::from(byte);
        }
        for (rank, pair) in ranks.iter_mut().zip(chunk.windows(2)) {
            *rank = self.get_bytes(pair[0], pair[1]);
        }
        while len > 1 {
            // The low bits hold the index, so that one minimum gives both the lowest rank and its index.
            let lowest = |best: u64, (i, &rank): (usize, &u32)| best.min(u64::from(rank) << 8 | i as u64);
            let best = ranks[..len - 1].iter().enumerate().fold(u64::MAX, lowest);
            let (at, id) = ((best & 0xff) as usize, (best >> 8) as u32);
            if id == NONE {
                break;
            }
            out[at] = id;
            len -= 1;
            for i in at + 1..len {
                out[i] = out[i + 1];
            }
            for i in at..len - 1 {
                ranks[i] = ranks[i + 1];
            }
            if at > 0 {
                ranks[at - 1] = self.get(out[at - 1], id);
            }
            if at + 1 < len {
                ranks[at] = self.get(id, out[at + 1]);
            }
        }
        len
    }

    /// Merges in the same order as `merge_short`. The parts form a linked list, and a heap finds the best pair.
    fn merge_long(&self, chunk: &[u8], out: &mut [u32]) -> usize {
        let len = chunk.len();
        let mut parts: Vec<u32> = chunk.iter().map(|&b| u32::from(b)).collect();
        let mut next: Vec<usize> = (1..=len).collect();
        let mut previous: Vec<usize> = (0..len).map(|i| i.wrapping_sub(1)).collect();
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> = (1..len)
            .map(|i| Reverse((self.get_bytes(chunk[i - 1], chunk[i]), i - 1)))
            .filter(|entry| entry.0.0 != NONE)
            .collect();
        while let Some(Reverse((id, at))) = heap.pop() {
            // Skip the entry if one of its parts has been merged since the entry was added. A part that no longer
            // exists holds NONE, which never merges.
            let right = next[at];
            if right >= len || self.get(parts[at], parts[right]) != id {
                continue;
            }
            parts[at] = id;
            parts[right] = NONE;
            next[at] = next[right];
            if next[at] < len {
                previous[next[at]] = at;
                let rank = self.get(id, parts[next[at]]);
                if rank != NONE {
                    heap.push(Reverse((rank, at)));
                }
            }
            if at > 0 {
                let left = previous[at];
                let rank = self.get(parts[left], id);
                if rank != NONE {
                    heap.push(Reverse((rank, left)));
                }
            }
        }
        let alive = parts.into_iter().filter(|&id| id != NONE);
        out.iter_mut().zip(alive).map(|(slot, id)| *slot = id).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "aa", "aaaa", "ab", "abab", "bb", "ll", "el", "ell", "é" and two merges that overlap with these.
    fn table() -> MergeTable {
        let merges =
            [(97, 97), (256, 256), (97, 98), (258, 258), (98, 98), (108, 108), (101, 108), (262, 108), (0xc3, 0xa9)];
        let mut table = MergeTable::new(merges.len() + 2);
        let more = [(260, 258), (264, 256)];
        merges.into_iter().chain(more).enumerate().for_each(|(i, pair)| table.insert(pair, 256 + i as u32));
        table
    }

    #[test]
    fn both_ways_of_merging_agree() {
        let table = table();
        let mut state = 3u64;
        for len in 1..=HEAP_ABOVE {
            for _ in 0..20 {
                let draw = |_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    b"aaabbh\xc3\xa9elow"[(state >> 33) as usize % 12]
                };
                let chunk: Vec<u8> = (0..len).map(draw).collect();
                let (mut short, mut long) = (vec![0; len], vec![0; len]);
                let short_len = table.merge_short::<HEAP_ABOVE>(&chunk, &mut short);
                let long_len = table.merge_long(&chunk, &mut long);
                assert_eq!(short[..short_len], long[..long_len], "{chunk:?}");
            }
        }
    }

    #[test]
    fn earlier_merges_come_first_and_the_leftmost_of_equal_ones() {
        let merge = |chunk: &[u8]| {
            let mut out = vec![0; chunk.len()];
            let len = table().merge(chunk, &mut out);
            out.truncate(len);
            out
        };
        assert_eq!(merge(b"aaa"), [256, 97]);
        assert_eq!(merge(b"aaaaa"), [257, 97]);
        assert_eq!(merge(b"ell"), [101, 261]);
        assert_eq!(merge(b""), [0u32; 0]);
        assert_eq!(merge(&b"a".repeat(1002)), [vec![257; 250], vec![256]].concat());
    }
}
