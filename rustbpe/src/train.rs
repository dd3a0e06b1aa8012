//! BPE training: counts the distinct chunks of a corpus, then merges the most frequent pair again and again.
//!
//! Ties go to the smallest (left id, right id), so the merges depend neither on hash order nor on threads.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::BuildHasher;

use hashbrown::HashTable;
use rayon::prelude::*;
use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::split::Splitter;

/// Two neighbouring token ids.
pub type Pair = (u32, u32);

/// How often each distinct chunk occurs. The bytes lie end to end in one vector: no allocation per chunk.
#[derive(Default)]
pub struct ChunkCounts {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    counts: Vec<i64>,
    index: HashTable<u32>,
}

impl ChunkCounts {
    /// Splits `texts` on all cores and counts their chunks.
    pub fn of_texts<T: AsRef<str> + Sync>(splitter: &Splitter, texts: &[T]) -> Result<Self, String> {
        // Few large pieces: each makes its own table, and tables must be added up.
        let piece = texts.len() / (4 * rayon::current_num_threads()) + 1;
        texts
            .par_iter()
            .with_min_len(piece)
            .try_fold(Self::default, |mut counts, text| {
                splitter.for_each(text.as_ref(), |chunk| counts.add(chunk, 1))?;
                Ok(counts)
            })
            .try_reduce(Self::default, |a, b| Ok(a.plus(b)))
    }

    pub fn add(&mut self, chunk: &[u8], count: i64) {
        let Self { bytes, ends, counts, index } = self;
        let hash = |chunk: &[u8]| FxBuildHasher.hash_one(chunk);
        if let Some(&i) = index.find(hash(chunk), |&i| slice(bytes, ends, i as usize) == chunk) {
            counts[i as usize] += count;
            return;
        }
        let i = u32::try_from(counts.len()).expect("fewer than 2^32 distinct chunks");
        bytes.extend_from_slice(chunk);
        ends.push(bytes.len());
        counts.push(count);
        index.insert_unique(hash(chunk), i, |&i| hash(slice(bytes, ends, i as usize)));
    }

    /// The sum of both; the smaller table is added to the larger.
    pub fn plus(self, other: Self) -> Self {
        let (mut large, small) = if self.counts.len() >= other.counts.len() { (self, other) } else { (other, self) };
        for (i, &count) in small.counts.iter().enumerate() {
            large.add(slice(&small.bytes, &small.ends, i), count);
        }
        large
    }

    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }
}

fn slice<'a>(bytes: &'a [u8], ends: &[usize], i: usize) -> &'a [u8] {
    let start = if i == 0 { 0 } else { ends[i - 1] };
    &bytes[start..ends[i]]
}

/// The distinct chunks as token ids, end to end. Words shrink in place as they are merged.
struct Words {
    ids: Vec<u32>,
    starts: Vec<usize>,
    lens: Vec<u32>,
    counts: Vec<i64>,
}

impl Words {
    fn new(chunks: ChunkCounts) -> Self {
        let ids = chunks.bytes.iter().map(|&b| u32::from(b)).collect();
        let starts: Vec<usize> = std::iter::once(0).chain(chunks.ends.iter().copied()).collect();
        let lens = starts.windows(2).map(|w| (w[1] - w[0]) as u32).collect();
        Self { ids, starts, lens, counts: chunks.counts }
    }

    fn get(&self, word: usize) -> &[u32] {
        &self.ids[self.starts[word]..][..self.lens[word] as usize]
    }

    /// Replaces `pair` by `id` in one word, left to right, and reports each neighbouring pair lost (-1) or gained (+1).
    fn merge(&mut self, word: usize, pair: Pair, id: u32, mut change: impl FnMut(Pair, i64)) {
        let (left, right) = pair;
        let ids = &mut self.ids[self.starts[word]..][..self.lens[word] as usize];
        let (mut read, mut write) = (0, 0);
        while read < ids.len() {
            if ids[read] == left && ids.get(read + 1) == Some(&right) {
                if write > 0 {
                    change((ids[write - 1], left), -1);
                    change((ids[write - 1], id), 1);
                }
                if let Some(&next) = ids.get(read + 2) {
                    change((right, next), -1);
                    change((id, next), 1);
                }
                ids[write] = id;
                read += 2;
            } else {
                ids[write] = ids[read];
                read += 1;
            }
            write += 1;
        }
        self.lens[word] = write as u32;
    }
}

/// A pair's total count, and the words in which it was seen (it may have left some of them since).
#[derive(Default)]
struct PairStat {
    count: i64,
    words: Vec<u32>,
}

impl PairStat {
    fn see(&mut self, word: usize) {
        let word = word as u32;
        if self.words.last() != Some(&word) {
            self.words.push(word);
        }
    }
}

/// Heap entry: the highest count first, then the smallest pair.
type Candidate = (i64, Reverse<Pair>);

/// Learns up to `num_merges` merges; fewer when every word has become one token. The i-th merge makes id 256 + i.
///
/// `tick(merges so far)` is called after each merge; its error stops the training and is returned.
pub fn learn_merges<E>(
    chunks: ChunkCounts,
    num_merges: usize,
    mut tick: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    let mut words = Words::new(chunks);
    let mut pairs = count_pairs(&words);
    let mut heap: BinaryHeap<Candidate> = pairs.iter().map(|(&pair, stat)| (stat.count, Reverse(pair))).collect();
    let mut merges = Vec::with_capacity(num_merges.min(1 << 20));
    while merges.len() < num_merges {
        let Some((count, Reverse(pair))) = heap.pop() else { break };
        // After the step in which a pair is born its count only falls, so a stale entry is too high, never too low:
        // put it back with its true count, and what comes out unchanged is the maximum.
        let current = pairs.get(&pair).map_or(0, |stat| stat.count);
        if current < count {
            if current > 0 {
                heap.push((current, Reverse(pair)));
            } else {
                pairs.remove(&pair);
            }
            continue;
        }
        let id = 256 + merges.len() as u32;
        let stat = pairs.remove(&pair).expect("a pair with a count");
        merges.push(pair);

        let mut born: FxHashMap<Pair, PairStat> = FxHashMap::default();
        for &word in &stat.words {
            let word = word as usize;
            let weight = words.counts[word];
            words.merge(word, pair, id, |changed, sign| {
                if changed.0 == id || changed.1 == id {
                    let stat = born.entry(changed).or_default();
                    stat.count += sign * weight;
                    stat.see(word);
                } else if let Some(stat) = pairs.get_mut(&changed) {
                    stat.count += sign * weight;
                }
            });
        }
        for (pair, stat) in born.into_iter().filter(|(_, stat)| stat.count > 0) {
            heap.push((stat.count, Reverse(pair)));
            pairs.insert(pair, stat);
        }
        tick(merges.len())?;
    }
    Ok(merges)
}

fn count_pairs(words: &Words) -> FxHashMap<Pair, PairStat> {
    let mut pairs: FxHashMap<Pair, PairStat> = FxHashMap::default();
    for (word, &count) in words.counts.iter().enumerate() {
        for pair in words.get(word).windows(2) {
            let stat = pairs.entry((pair[0], pair[1])).or_default();
            stat.count += count;
            stat.see(word);
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::GPT4_PATTERN;
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    fn learn(texts: &[String], num_merges: usize) -> Vec<Pair> {
        let chunks = ChunkCounts::of_texts(&Splitter::new(GPT4_PATTERN).unwrap(), texts).unwrap();
        learn_merges(chunks, num_merges, |_| Ok::<_, Infallible>(())).unwrap()
    }

    /// Counts every pair afresh before each merge.
    fn learn_slowly(texts: &[String], num_merges: usize) -> Vec<Pair> {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let mut words: Vec<Vec<u32>> = vec![];
        for text in texts {
            splitter.for_each(text, |c| words.push(c.iter().map(|&b| b.into()).collect())).unwrap();
        }
        let mut merges = vec![];
        while merges.len() < num_merges {
            let mut counts: BTreeMap<Pair, i64> = BTreeMap::new();
            words.iter().flat_map(|w| w.windows(2)).for_each(|p| *counts.entry((p[0], p[1])).or_default() += 1);
            let Some((&pair, _)) = counts.iter().max_by_key(|&(&pair, &count)| (count, Reverse(pair))) else { break };
            for word in &mut words {
                let mut out = vec![];
                let mut i = 0;
                while i < word.len() {
                    let hit = word[i] == pair.0 && word.get(i + 1) == Some(&pair.1);
                    out.push(if hit { 256 + merges.len() as u32 } else { word[i] });
                    i += 1 + usize::from(hit);
                }
                *word = out;
            }
            merges.push(pair);
        }
        merges
    }

    /// Texts over few letters: many ties, many runs of one letter.
    fn random_texts(mut state: u64) -> Vec<String> {
        let mut draw = move |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        (0..20).map(|_| (0..draw(40)).map(|_| b"aaab c"[draw(6) as usize] as char).collect()).collect()
    }

    #[test]
    fn equals_counting_afresh_before_each_merge() {
        for seed in 0..60 {
            let texts = random_texts(seed);
            assert_eq!(learn(&texts, 40), learn_slowly(&texts, 40), "{texts:?}");
        }
    }

    #[test]
    fn does_not_depend_on_the_number_of_threads() {
        let texts = random_texts(7);
        let with = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(|| learn(&texts, 40));
        assert_eq!(with(1), with(5));
    }

    #[test]
    fn stops_when_words_are_used_up_and_when_told() {
        let texts = ["abcd".to_string()];
        assert_eq!(learn(&texts, 100).len(), 3);
        let chunks = ChunkCounts::of_texts(&Splitter::new(GPT4_PATTERN).unwrap(), &texts).unwrap();
        assert_eq!(learn_merges(chunks, 100, |n| if n == 2 { Err("stop") } else { Ok(()) }), Err("stop"));
    }
}
