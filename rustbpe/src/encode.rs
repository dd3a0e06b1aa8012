//! Encodes text to token ids with the learned merges, and decodes ids to bytes. Decoding an encoded text restores it,
//! except for parts that the pattern does not match.

use std::sync::{Mutex, PoisonError};

use crate::cache::{self, Cache};
use crate::chunk::{Chunk, Key, MAX_SHORT};
use crate::merge::{MergeTable, Pair};
use crate::split::Splitter;

/// The number of chunks that are split before the first of them is looked up in the cache.
const AHEAD: usize = 32;

pub struct Encoder {
    splitter: Splitter,
    merges: Vec<Pair>,
    table: MergeTable,
    /// The bytes of all tokens, one token after another. Token i is `bytes[starts[i]..starts[i + 1]]`.
    bytes: Vec<u8>,
    starts: Vec<usize>,
    /// The caches that no thread is using. If this list is empty, `with_cache` makes a new cache.
    caches: Mutex<Vec<Cache>>,
}

impl Encoder {
    /// Ids 0 to 255 are the bytes, and id 256 + i is the i-th merge.
    pub fn new(splitter: Splitter, merges: &[Pair]) -> Self {
        let mut encoder = Self::of_bytes(splitter, merges.len());
        merges.iter().for_each(|&pair| encoder.push(pair));
        encoder
    }

    /// Makes an encoder from the bytes of all tokens, in the order of their ids. The merges are recovered one by one:
    /// the earlier merges encode the bytes of each token as two ids, and this pair is the token's own merge. An error
    /// names the first token that is not encoded as two ids.
    ///
    /// [.., "ab", "abc"] -> merges (97, 98), (256, 99)
    pub fn from_tokens(splitter: Splitter, tokens: &[Vec<u8>]) -> Result<Self, String> {
        if tokens.len() < 256 {
            return Err(format!("got {} tokens, expected at least the 256 bytes", tokens.len()));
        }
        let mut encoder = Self::of_bytes(splitter, tokens.len() - 256);
        if let Some(id) = (0..256).find(|&id| tokens[id] != [id as u8]) {
            return Err(format!("token {id} is {:02x?}, expected the byte [{id:02x}]", tokens[id]));
        }
        let mut parts = vec![];
        for (id, bytes) in tokens.iter().enumerate().skip(256) {
            parts.resize(bytes.len().max(parts.len()), 0);
            let len = encoder.table.merge(bytes, &mut parts);
            match parts[..len] {
                [left, right] => encoder.push((left, right)),
                _ => {
                    let ids = &parts[..len];
                    let found = format!("the merges before it encode its bytes as {ids:?}, expected two ids");
                    return Err(format!("token {id} ({bytes:02x?}) is not a merge of two earlier tokens: {found}"));
                }
            }
        }
        Ok(encoder)
    }

    fn of_bytes(splitter: Splitter, num_merges: usize) -> Self {
        Self {
            splitter,
            merges: Vec::with_capacity(num_merges),
            table: MergeTable::new(num_merges),
            bytes: (0..=255).collect(),
            starts: (0..=256).collect(),
            caches: Mutex::default(),
        }
    }

    fn push(&mut self, pair: Pair) {
        self.table.insert(pair, self.vocab_size() as u32);
        for id in [pair.0, pair.1] {
            self.bytes.extend_from_within(self.starts[id as usize]..self.starts[id as usize + 1]);
        }
        self.starts.push(self.bytes.len());
        self.merges.push(pair);
    }

    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    pub fn merges(&self) -> &[Pair] {
        &self.merges
    }

    /// The number of tokens: 256 bytes and the merges.
    pub fn vocab_size(&self) -> usize {
        self.starts.len() - 1
    }

    /// The bytes of every token, in the order of their ids.
    pub fn tokens(&self) -> impl Iterator<Item = &[u8]> {
        self.starts.windows(2).map(|w| &self.bytes[w[0]..w[1]])
    }

    /// The ids of a text. Fails only if the pattern fails (see `Splitter::chunks`).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        let mut ids = vec![0; Self::room_for(text)];
        let len = self.with_cache(|cache| self.encode_with(cache, text, &mut ids))?;
        ids.truncate(len);
        Ok(ids)
    }

    /// Calls `use_it` with a cache that no other thread is using. The encoder keeps its caches, so each call speeds up
    /// later calls.
    pub fn with_cache<R>(&self, use_it: impl FnOnce(&mut Cache) -> R) -> R {
        let free = || self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let cache = free().pop();
        let mut cache = cache.unwrap_or_else(|| self.new_cache());
        let result = use_it(&mut cache);
        free().push(cache);
        result
    }

    /// A new cache that contains the short tokens of the vocabulary. A chunk with the same bytes as a token is encoded
    /// as this token, because the same merges apply.
    fn new_cache(&self) -> Cache {
        let mut cache = Cache::default();
        for (id, token) in self.tokens().enumerate().filter(|(_, token)| token.len() <= MAX_SHORT) {
            cache.put_if_free(Key::of(token), &[id as u32]);
        }
        cache
    }

    /// The length that `out` must have in `encode_with`. A text has at most one id per byte. The extra room is needed
    /// because INLINE_IDS ids are always copied at once.
    pub fn room_for(text: &str) -> usize {
        text.len() + cache::INLINE_IDS
    }

    /// Writes the ids of `text` to the beginning of `out`, and returns their number.
    pub fn encode_with(&self, cache: &mut Cache, text: &str, out: &mut [u32]) -> Result<usize, String> {
        let (bytes, mut at) = (text.as_bytes(), 0);
        let mut chunks = self.splitter.chunks(text);
        // While the later chunks of a group are split, the cache lines of the earlier chunks arrive from memory.
        let mut ahead = [Chunk::default(); AHEAD];
        let mut buckets = [0; AHEAD];
        loop {
            let mut len = 0;
            while len < AHEAD {
                let Some(chunk) = chunks.next() else { break };
                ahead[len] = chunk?;
                buckets[len] = cache.prefetch(ahead[len].key);
                len += 1;
            }
            for (chunk, &bucket) in ahead[..len].iter().zip(&buckets) {
                if let Some(entry) = cache.get(bucket, chunk.key) {
                    out[at..at + cache::INLINE_IDS].copy_from_slice(&entry.ids);
                    at += entry.len as usize;
                } else {
                    at += self.encode_miss(cache, chunk.key, &bytes[chunk.range()], &mut out[at..]);
                }
            }
            if len < AHEAD {
                return Ok(at);
            }
        }
    }

    /// Handles a chunk that `Cache::get` has not found. Writes its ids to `out`, caches them, and returns their number.
    #[cold]
    fn encode_miss(&self, cache: &mut Cache, key: Key, chunk: &[u8], out: &mut [u32]) -> usize {
        if let Some(ids) = cache.get_long(chunk) {
            out[..ids.len()].copy_from_slice(ids);
            return ids.len();
        }
        let len = self.table.merge(chunk, out);
        if key.is_short() && len <= cache::INLINE_IDS {
            cache.put(key, &out[..len]);
        } else {
            cache.put_long(chunk, &out[..len]);
        }
        len
    }

    /// Decodes ids to bytes. If an id is outside the vocabulary, the error names this id.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::with_capacity(5 * ids.len());
        for &id in ids {
            match self.starts.get(id as usize..).and_then(|starts| starts.first_chunk()) {
                Some(&[start, end]) => bytes.extend_from_slice(&self.bytes[start..end]),
                None => return Err(self.outside(&id)),
            }
        }
        Ok(bytes)
    }

    /// The error message for an id outside the vocabulary.
    pub fn outside(&self, id: &dyn std::fmt::Display) -> String {
        format!("token id {id} is outside the vocabulary (0 to {})", self.vocab_size() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::count::ChunkCounts;
    use crate::parallel::{Plan, feed_all};
    use crate::split::GPT4_PATTERN;
    use crate::train::learn_merges;

    fn splitter() -> Splitter {
        Splitter::new(GPT4_PATTERN).unwrap()
    }

    fn encoder() -> Encoder {
        let text = "aaaa aaab abab hello yellow fellow héé hé naïve ".repeat(3) + &"ab".repeat(40) + &"b".repeat(33);
        let chunks = ChunkCounts::of_texts(&splitter(), Plan::new(None), feed_all([text])).unwrap();
        Encoder::new(splitter(), &learn_merges(chunks, 80, |_| Ok::<_, String>(())).unwrap())
    }

    #[test]
    fn the_bytes_of_a_token_encode_to_that_token() {
        let encoder = encoder();
        for (id, bytes) in encoder.tokens().enumerate() {
            let mut ids = vec![0; bytes.len()];
            let len = encoder.table.merge(bytes, &mut ids);
            assert_eq!(ids[..len], [id as u32]);
        }
    }

    #[test]
    fn merges_are_recovered_from_tokens() {
        let encoder = encoder();
        let mut tokens: Vec<Vec<u8>> = encoder.tokens().map(|token| token.to_vec()).collect();
        assert_eq!(Encoder::from_tokens(splitter(), &tokens).unwrap().merges(), encoder.merges());
        tokens.swap(0, 1);
        assert!(Encoder::from_tokens(splitter(), &tokens).err().unwrap().contains("token 0 is"));
        tokens.swap(0, 1);
        tokens[280] = b"zzz".to_vec();
        assert!(Encoder::from_tokens(splitter(), &tokens).err().unwrap().contains("token 280"));
    }

    #[test]
    fn the_cache_does_not_change_the_ids() {
        // Some of these chunks are too long for a key, many have too many ids for an entry, and some end in zero bytes.
        // The first 5,000 words are encoded a second time, from the cache.
        let encoder = encoder();
        let mut state = 5u64;
        let mut draw = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        let words: Vec<String> =
            (0..30_000).map(|_| (0..1 + draw(20)).map(|_| b"aabbhelo\0"[draw(9)] as char).collect()).collect();
        for word in words.iter().chain(&words[..5000]) {
            let mut merged = vec![0; word.len()];
            let mut len = 0;
            for chunk in encoder.splitter.chunks(word) {
                len += encoder.table.merge(&word.as_bytes()[chunk.unwrap().range()], &mut merged[len..]);
            }
            assert_eq!(encoder.encode(word).unwrap(), merged[..len], "{word:?}");
        }
    }

    #[test]
    fn a_megabyte_of_one_letter_round_trips() {
        let encoder = encoder();
        let text = "a".repeat(1_000_000);
        assert_eq!(encoder.decode(&encoder.encode(&text).unwrap()).unwrap(), text.as_bytes());
    }

    #[test]
    fn ids_outside_the_vocabulary_are_named() {
        assert!(encoder().decode(&[97, 9999]).unwrap_err().contains("9999"));
        assert!(encoder().decode(&[u32::MAX]).is_err());
    }
}
