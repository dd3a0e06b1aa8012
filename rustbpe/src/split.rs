//! Splits text into chunks. Merges never cross the boundaries of chunks. In: a pattern and a text. Out: the chunks in
//! order. GPT-4's pattern has a hand-written scanner (`scan`), which also supports a limit of one or two digits instead
//! of three. All other patterns use a regex engine.

use std::ops::Range;

use fancy_regex::{Matches, Regex};

use crate::chunk::Chunk;
use crate::scan::{self, Scanner};

/// GPT-4's pattern, which splits numbers into groups of up to three digits.
pub const GPT4_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// The end of error messages about empty matches. The splitter would never advance after an empty match.
const NON_EMPTY: &str = "expected at least one character in every match";

pub struct Splitter {
    pattern: String,
    engine: Engine,
}

enum Engine {
    /// GPT-4's pattern, with at most this many digits in a chunk.
    Scanner(usize),
    Regex(Box<Regex>),
}

impl Splitter {
    /// Fails if the pattern does not compile or matches the empty string.
    pub fn new(pattern: &str) -> Result<Self, String> {
        let digits = (1..=3).find(|n| pattern == GPT4_PATTERN.replace("{1,3}", &format!("{{1,{n}}}")));
        let engine = match digits {
            Some(digits) => Engine::Scanner(digits),
            None => {
                let regex =
                    Regex::new(pattern).map_err(|e| format!("the pattern {pattern:?} does not compile: {e}"))?;
                if matches!(regex.is_match(""), Ok(true)) {
                    return Err(format!("the pattern {pattern:?} can match the empty string, {NON_EMPTY}"));
                }
                Engine::Regex(Box::new(regex))
            }
        };
        Ok(Self { pattern: pattern.to_string(), engine })
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Whether the hand-written scanner handles the pattern.
    pub fn is_scanner(&self) -> bool {
        matches!(self.engine, Engine::Scanner(_))
    }

    /// The chunks of `text` in order: "a cat" -> "a", " cat"
    ///
    /// Text that the pattern does not match is skipped, as in tiktoken. GPT-4's pattern matches everything. The
    /// iterator yields an error if a match is empty, if two matches overlap, or if the regex engine reaches its
    /// backtracking limit. A lookbehind that contains `\K` can make matches overlap.
    #[inline]
    pub fn chunks<'t>(&'t self, text: &'t str) -> Chunks<'t> {
        match &self.engine {
            Engine::Scanner(digits) => Chunks::Scanner(Scanner::new(text, *digits)),
            Engine::Regex(regex) => Chunks::Regex { text, matches: Box::new(regex.find_iter(text)), end: 0 },
        }
    }

    /// Cuts `text` into parts of about `size` bytes, without changing its chunks. With a regex engine, there is only
    /// one part, because it is unknown where the text can be cut.
    pub fn parts(&self, text: &str, size: usize) -> Vec<Range<usize>> {
        let mut parts = vec![];
        let mut start = 0;
        while start < text.len() {
            let end = match self.engine {
                Engine::Scanner(_) => scan::cut_from(text, start + size.max(1)),
                Engine::Regex(_) => text.len(),
            };
            parts.push(start..end);
            start = end;
        }
        parts
    }
}

pub enum Chunks<'t> {
    Scanner(Scanner<'t>),
    /// `end` is the end of the previous chunk.
    Regex {
        text: &'t str,
        matches: Box<Matches<'t, 't, str>>,
        end: usize,
    },
}

impl Iterator for Chunks<'_> {
    type Item = Result<Chunk, String>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Chunks::Scanner(scanner) => scanner.next().map(Ok),
            Chunks::Regex { text, matches, end } => next_match(text, matches, end),
        }
    }
}

#[inline(never)]
fn next_match(text: &str, matches: &mut Matches<str>, end: &mut usize) -> Option<Result<Chunk, String>> {
    Some(match matches.next()? {
        Ok(found) if found.range().is_empty() => {
            Err(format!("the pattern matches the empty string at byte {}, {NON_EMPTY}", found.start()))
        }
        // The caller's buffer has room for one id per byte, so no byte may occur in two chunks.
        Ok(found) if found.start() < *end => {
            let (start, fix) = (found.start(), r"remove \K from its lookbehinds");
            Err(format!(
                "the pattern's matches overlap: one ends at byte {end}, the next begins at byte {start}: {fix}"
            ))
        }
        Ok(found) => {
            *end = found.end();
            Ok(Chunk::new(text.as_bytes(), found.range()))
        }
        Err(error) => Err(format!("the pattern fails after byte {end}: {error} (simplify the pattern)")),
    })
}
