//! BPE encoding and decoding with learned merges.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use crate::split::Splitter;
use crate::train::Pair;

/// Longer chunks are merged through a heap (n log n): searching for the best pair again and again is quadratic.
const HEAP_FROM: usize = 96;

const NONE: u32 = u32::MAX;

pub struct Encoder {
    splitter: Splitter,
    tokens: Vec<Vec<u8>>,
    merges: Vec<Pair>,
    by_pair: FxHashMap<Pair, u32>,
    by_bytes: FxHashMap<Vec<u8>, u32>,
}

impl Encoder {
    /// Ids 0..=255 are the bytes, id 256 + i the i-th merge.
    pub fn new(splitter: Splitter, merges: Vec<Pair>) -> Self {
        let mut encoder = Self {
            splitter,
            tokens: (0..=255).map(|b| vec![b]).collect(),
            merges: vec![],
            by_pair: FxHashMap::default(),
            by_bytes: (0..=255u8).map(|b| (vec![b], b.into())).collect(),
        };
        merges.into_iter().for_each(|pair| encoder.push(pair));
        encoder
    }

    /// From the bytes of all tokens in the order of their ids. The merge behind a token is what its bytes become under
    /// the merges before it; fails, naming the token, where that is not two tokens.
    pub fn from_tokens(splitter: Splitter, tokens: &[Vec<u8>]) -> Result<Self, String> {
        if tokens.len() < 256 {
            return Err(format!("{} tokens, expected at least the 256 bytes", tokens.len()));
        }
        let mut encoder = Self::new(splitter, vec![]);
        if let Some(id) = (0..256).find(|&id| tokens[id] != encoder.tokens[id]) {
            return Err(format!("token {id} is {:02x?}, expected the byte {id:02x}", tokens[id]));
        }
        for (id, bytes) in tokens.iter().enumerate().skip(256) {
            let mut parts = vec![];
            encoder.merge_bytes(bytes, &mut parts);
            match parts[..] {
                [left, right] => encoder.push((left, right)),
                _ => return Err(format!("token {id} ({bytes:02x?}) is not the union of two earlier tokens")),
            }
        }
        Ok(encoder)
    }

    fn push(&mut self, pair: Pair) {
        let id = self.tokens.len() as u32;
        let bytes = [&self.tokens[pair.0 as usize][..], &self.tokens[pair.1 as usize]].concat();
        self.by_bytes.insert(bytes.clone(), id);
        self.by_pair.insert(pair, id);
        self.tokens.push(bytes);
        self.merges.push(pair);
    }

    pub fn pattern(&self) -> &str {
        self.splitter.pattern()
    }

    pub fn merges(&self) -> &[Pair] {
        &self.merges
    }

    /// The bytes of every token, by id.
    pub fn tokens(&self) -> &[Vec<u8>] {
        &self.tokens
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.splitter.for_each(text, |chunk| match self.by_bytes.get(chunk) {
            Some(&id) => ids.push(id),
            None => self.merge_bytes(chunk, &mut ids),
        })?;
        Ok(ids)
    }

    /// One list of ids a text, on all cores.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Vec<Vec<u32>>, String> {
        texts.par_iter().map(|text| self.encode(text.as_ref())).collect()
    }

    /// Fails, naming the id, on one outside the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::with_capacity(ids.len() * 5);
        for &id in ids {
            let token = self.tokens.get(id as usize);
            let size = self.tokens.len();
            bytes.extend(token.ok_or_else(|| format!("token id {id} is outside the vocabulary (0 to {})", size - 1))?);
        }
        Ok(bytes)
    }

    fn merged(&self, left: u32, right: u32) -> u32 {
        self.by_pair.get(&(left, right)).copied().unwrap_or(NONE)
    }

    fn merge_bytes(&self, chunk: &[u8], out: &mut Vec<u32>) {
        if chunk.len() < HEAP_FROM { self.merge_short(chunk, out) } else { self.merge_long(chunk, out) }
    }

    /// The pair with the lowest id first, the leftmost of equal ones. Works in the tail of `out`.
    fn merge_short(&self, chunk: &[u8], out: &mut Vec<u32>) {
        let start = out.len();
        out.extend(chunk.iter().map(|&b| u32::from(b)));
        let mut results = [NONE; HEAP_FROM]; // what the part at this place and the next one would become
        let mut len = chunk.len();
        for i in 1..len {
            results[i - 1] = self.merged(out[start + i - 1], out[start + i]);
        }
        while len > 1 {
            let parts = &mut out[start..start + len];
            let (at, &id) = results[..len - 1].iter().enumerate().min_by_key(|&(_, id)| id).expect("two parts or more");
            if id == NONE {
                break;
            }
            parts[at] = id;
            parts.copy_within(at + 2.., at + 1);
            results.copy_within(at + 1..len - 1, at);
            len -= 1;
            if at > 0 {
                results[at - 1] = self.merged(parts[at - 1], id);
            }
            if at + 1 < len {
                results[at] = self.merged(id, parts[at + 1]);
            }
        }
        out.truncate(start + len);
    }

    /// The same order through a heap over a linked list of parts.
    fn merge_long(&self, chunk: &[u8], out: &mut Vec<u32>) {
        let len = chunk.len();
        let mut parts: Vec<u32> = chunk.iter().map(|&b| u32::from(b)).collect();
        let mut next: Vec<usize> = (1..=len).collect();
        let mut previous: Vec<usize> = (0..len).map(|i| i.wrapping_sub(1)).collect();
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> = (1..len)
            .map(|i| Reverse((self.merged(parts[i - 1], parts[i]), i - 1)))
            .filter(|entry| entry.0.0 != NONE)
            .collect();
        while let Some(Reverse((id, at))) = heap.pop() {
            // An entry is stale when either part has been merged away; a dead part holds NONE, which no merge has.
            let right = next[at];
            if right >= len || self.merged(parts[at], parts[right]) != id {
                continue;
            }
            parts[at] = id;
            parts[right] = NONE;
            next[at] = next[right];
            if next[at] < len {
                previous[next[at]] = at;
                let gained = self.merged(id, parts[next[at]]);
                if gained != NONE {
                    heap.push(Reverse((gained, at)));
                }
            }
            if at > 0 {
                let left = previous[at];
                let gained = self.merged(parts[left], id);
                if gained != NONE {
                    heap.push(Reverse((gained, left)));
                }
            }
        }
        out.extend(parts.into_iter().filter(|&id| id != NONE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::GPT4_PATTERN;
    use crate::train::{ChunkCounts, learn_merges};
    use std::convert::Infallible;

    fn encoder() -> Encoder {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let text = "aaaa aaab abab hello yellow fellow héé hé naïve ".repeat(3) + &"ab".repeat(40) + &"b".repeat(33);
        let merges = learn_merges(ChunkCounts::of_texts(&splitter, &[text]).unwrap(), 80, |_| Ok::<_, Infallible>(()));
        Encoder::new(splitter, merges.unwrap())
    }

    #[test]
    fn both_merge_orders_agree() {
        let encoder = encoder();
        let mut state = 3u64;
        for len in 2..HEAP_FROM {
            for _ in 0..20 {
                let draw = |_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    b"aaabbh\xc3\xa9elow"[(state >> 33) as usize % 12]
                };
                let chunk: Vec<u8> = (0..len).map(draw).collect();
                let (mut short, mut long) = (vec![], vec![]);
                encoder.merge_short(&chunk, &mut short);
                encoder.merge_long(&chunk, &mut long);
                assert_eq!(short, long, "{chunk:?}");
                assert_eq!(encoder.decode(&short).unwrap(), chunk);
            }
        }
    }

    #[test]
    fn every_token_encodes_to_itself() {
        let encoder = encoder();
        for (id, bytes) in encoder.tokens().iter().enumerate() {
            let mut ids = vec![];
            encoder.merge_bytes(bytes, &mut ids);
            assert_eq!(ids, [id as u32]);
        }
    }

    #[test]
    fn merges_are_recovered_from_tokens() {
        let encoder = encoder();
        let splitter = || Splitter::new(GPT4_PATTERN).unwrap();
        let again = Encoder::from_tokens(splitter(), encoder.tokens()).unwrap();
        assert_eq!(again.merges(), encoder.merges());
        let mut tokens = encoder.tokens().to_vec();
        tokens.swap(0, 1);
        assert!(Encoder::from_tokens(splitter(), &tokens).err().unwrap().contains("token 0 is"));
        tokens.swap(0, 1);
        tokens[280] = b"zzz".to_vec();
        assert!(Encoder::from_tokens(splitter(), &tokens).err().unwrap().contains("token 280"));
    }

    #[test]
    fn a_megabyte_of_one_letter_is_no_trouble() {
        let encoder = encoder();
        let text = "a".repeat(1_000_000);
        let ids = encoder.encode(&text).unwrap();
        assert_eq!(encoder.decode(&ids).unwrap(), text.as_bytes());
    }

    #[test]
    fn ids_outside_the_vocabulary_are_named() {
        assert!(encoder().decode(&[97, 9999]).unwrap_err().contains("9999"));
    }
}
