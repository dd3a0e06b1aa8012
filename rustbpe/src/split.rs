//! Splits text into chunks; merges never cross a chunk's border.
//!
//! The GPT-4 style patterns are served by a hand-written scanner, which is many times faster than a backtracking
//! regex and needs no stack for long runs. It reads its character classes from the tables of the regex engine that
//! serves every other pattern, so that the two cannot disagree about Unicode.

use std::ops::Range;
use std::sync::LazyLock;

use fancy_regex::Regex;
use regex_syntax::hir::{Class, HirKind};

/// GPT-4's pattern, numbers in groups of up to three digits.
pub const GPT4_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

pub struct Splitter {
    pattern: String,
    engine: Engine,
}

enum Engine {
    /// The GPT-4 pattern with numbers of at most this many digits.
    Scanner(usize),
    Regex(Box<Regex>),
}

impl Splitter {
    /// Fails, with a sentence, on a pattern that does not compile or that matches the empty string.
    pub fn new(pattern: &str) -> Result<Self, String> {
        let digits = (1..=3).find(|n| pattern == GPT4_PATTERN.replace("{1,3}", &format!("{{1,{n}}}")));
        let engine = match digits {
            Some(digits) => Engine::Scanner(digits),
            None => {
                let regex = Regex::new(pattern).map_err(|e| format!("pattern does not compile: {e}"))?;
                if matches!(regex.is_match(""), Ok(true)) {
                    return Err(format!("pattern {pattern:?} can match nothing, so it would never move on"));
                }
                Engine::Regex(Box::new(regex))
            }
        };
        Ok(Self { pattern: pattern.to_string(), engine })
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `visit` with every chunk of `text` in order. Fails only where a regex gives up (its backtracking limit).
    pub fn for_each<'t>(&self, text: &'t str, mut visit: impl FnMut(&'t [u8])) -> Result<(), String> {
        match &self.engine {
            Engine::Scanner(digits) => {
                let bytes = text.as_bytes();
                let mut start = 0;
                while start < bytes.len() {
                    let end = chunk_end(bytes, start, *digits);
                    visit(&bytes[start..end]);
                    start = end;
                }
            }
            Engine::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|e| format!("pattern failed on a text of {} bytes: {e}", text.len()))?;
                    if !found.as_str().is_empty() {
                        visit(found.as_str().as_bytes());
                    }
                }
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(u8)]
enum Kind {
    Other,
    Letter,
    Number,
    Space,
    Newline,
    End,
}

/// The kind of every code point: flat, because a byte each is small and one load beats a search.
static KINDS: LazyLock<Vec<Kind>> = LazyLock::new(|| {
    let mut kinds = vec![Kind::Other; char::MAX as usize + 1];
    for (class, kind) in [(r"\s", Kind::Space), (r"\p{L}", Kind::Letter), (r"\p{N}", Kind::Number)] {
        for range in code_points(class) {
            kinds[range].fill(kind);
        }
    }
    kinds['\r' as usize] = Kind::Newline;
    kinds['\n' as usize] = Kind::Newline;
    kinds
});

fn code_points(class: &str) -> Vec<Range<usize>> {
    let hir = regex_syntax::parse(class).expect("a constant class parses");
    let HirKind::Class(Class::Unicode(set)) = hir.kind() else { unreachable!("a Unicode class") };
    set.ranges().iter().map(|r| r.start() as usize..r.end() as usize + 1).collect()
}

/// Kind and byte length of the character at `at`; (End, 0) past the end. `text` is valid UTF-8, `at` a border in it.
#[inline(always)]
fn kind_at(kinds: &[Kind], text: &[u8], at: usize) -> (Kind, usize) {
    let Some(&first) = text.get(at) else { return (Kind::End, 0) };
    if first < 0x80 {
        return (kinds[first as usize], 1);
    }
    let tail = |i: usize| (text[at + i] & 0x3f) as usize;
    match first {
        0x80..0xe0 => (kinds[(first as usize & 0x1f) << 6 | tail(1)], 2),
        0xe0..0xf0 => (kinds[(first as usize & 0x0f) << 12 | tail(1) << 6 | tail(2)], 3),
        _ => (kinds[(first as usize & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3)], 4),
    }
}

/// End of the run of characters of one kind that begins at `at` (which may be empty).
#[inline(always)]
fn run_end(kinds: &[Kind], text: &[u8], mut at: usize, wanted: Kind) -> usize {
    loop {
        let (kind, len) = kind_at(kinds, text, at);
        if kind != wanted {
            return at;
        }
        at += len;
    }
}

/// End of the chunk that begins at `start`. Whatever the character, some alternative of the pattern takes it, so
/// the chunks cover the text. The alternatives are tried in the pattern's order.
fn chunk_end(text: &[u8], start: usize, digits: usize) -> usize {
    let kinds = KINDS.as_slice();
    if text[start] == b'\'' {
        if let Some(len) = contraction(&text[start + 1..]) {
            return start + 1 + len;
        }
    }
    let (kind, len) = kind_at(kinds, text, start);
    let next = start + len;
    match kind {
        Kind::Letter => run_end(kinds, text, next, Kind::Letter),
        Kind::Number => number_end(kinds, text, next, digits),
        Kind::Newline => whitespace_end(kinds, text, start),
        _ => match (kind, kind_at(kinds, text, next).0) {
            // One character that is no letter, number or newline may open a word: " word", "-word".
            (_, Kind::Letter) => run_end(kinds, text, next, Kind::Letter),
            (Kind::Other, _) => symbols_end(kinds, text, next),
            (_, Kind::Other) if text[start] == b' ' => symbols_end(kinds, text, next),
            _ => whitespace_end(kinds, text, start),
        },
    }
}

/// Bytes that `(?i:[sdmt]|ll|ve|re)` takes. Case folding adds the long s (U+017F) to the letter s.
fn contraction(text: &[u8]) -> Option<usize> {
    let second = text.get(1).map(u8::to_ascii_lowercase);
    match (text.first()?.to_ascii_lowercase(), second) {
        (b's' | b'd' | b'm' | b't', _) => Some(1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(2),
        (0xc5, Some(0xbf)) => Some(2),
        _ => None,
    }
}

fn number_end(kinds: &[Kind], text: &[u8], mut at: usize, digits: usize) -> usize {
    for _ in 1..digits {
        let (kind, len) = kind_at(kinds, text, at);
        if kind != Kind::Number {
            break;
        }
        at += len;
    }
    at
}

fn symbols_end(kinds: &[Kind], text: &[u8], at: usize) -> usize {
    let at = run_end(kinds, text, at, Kind::Other);
    run_end(kinds, text, at, Kind::Newline)
}

/// `\s*[\r\n]|\s+(?!\S)|\s+`: up to the last newline of the run; else all of a run that ends the text; else all but
/// its last character, which is left to open the next word; else that character.
fn whitespace_end(kinds: &[Kind], text: &[u8], start: usize) -> usize {
    let (mut at, mut last, mut after_newline) = (start, start, start);
    loop {
        let (kind, len) = kind_at(kinds, text, at);
        match kind {
            Kind::Newline => after_newline = at + len,
            Kind::Space => {}
            _ if after_newline > start => return after_newline,
            Kind::End => return at,
            _ => return if last > start { last } else { at },
        }
        last = at;
        at += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut out = vec![];
        splitter.for_each(text, |c| out.push(String::from_utf8(c.to_vec()).unwrap())).unwrap();
        out
    }

    /// The scanner for `digits`, and the regex engine on the same pattern (grouped, so that it is not recognised).
    fn both(digits: usize) -> (Splitter, Splitter) {
        let pattern = GPT4_PATTERN.replace("{1,3}", &format!("{{1,{digits}}}"));
        let (fast, slow) = (Splitter::new(&pattern).unwrap(), Splitter::new(&format!("(?:{pattern})")).unwrap());
        assert!(matches!(fast.engine, Engine::Scanner(n) if n == digits) && matches!(slow.engine, Engine::Regex(_)));
        (fast, slow)
    }

    #[test]
    fn every_character_in_context_splits_as_the_regex_does() {
        let (fast, slow) = both(2);
        for c in ('\0'..=char::MAX).filter(|c| !c.is_ascii()).step_by(31).chain('\0'..='\u{3100}') {
            for text in [format!("a{c} {c}{c}1{c}\n"), format!("'{c}l.{c}e {c}'")] {
                assert_eq!(chunks(&fast, &text), chunks(&slow, &text), "{text:?}");
            }
        }
    }

    #[test]
    fn all_short_strings_over_one_character_of_each_kind_split_as_the_regex_does() {
        let alphabet =
            ['\'', 's', 'L', 'v', 'E', 'ſ', ' ', '\t', '\u{2003}', '\n', '\r', '7', '½', '-', '\u{301}', '字', '😀'];
        for digits in 1..=3 {
            let (fast, slow) = both(digits);
            for n in 0..alphabet.len().pow(4) {
                let text: String = (0..4).map(|i| alphabet[n / alphabet.len().pow(i) % alphabet.len()]).collect();
                assert_eq!(chunks(&fast, &text), chunks(&slow, &text), "{text:?}");
            }
        }
    }

    #[test]
    fn long_random_strings_split_as_the_regex_does() {
        let alphabet: Vec<char> =
            "'sdmtlLvVeErR \t\u{a0}\n\r\u{85}\u{2028}09²Ⅷaé字._#😀\u{301}\u{200d}".chars().collect();
        let (fast, slow) = both(2);
        let mut state = 1u64;
        for _ in 0..3000 {
            let text: String = (0..60)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    alphabet[(state >> 33) as usize % alphabet.len()]
                })
                .collect();
            let split = chunks(&fast, &text);
            assert_eq!(split, chunks(&slow, &text), "{text:?}");
            assert_eq!(split.concat(), text);
        }
    }

    #[test]
    fn long_runs_take_linear_time_and_no_stack() {
        let (fast, _) = both(2);
        for (unit, tail, expected) in
            [(" ", "", 1), (" ", "x", 2), ("a", "", 1), ("\n", "", 1), ("!", "\n", 1), ("7", "", 500_000)]
        {
            let text = unit.repeat(1_000_000) + tail;
            assert_eq!(chunks(&fast, &text).len(), expected, "{unit:?} {tail:?}");
        }
    }

    #[test]
    fn unusable_patterns_are_refused() {
        assert!(Splitter::new("(").err().unwrap().contains("does not compile"));
        assert!(Splitter::new("a*").err().unwrap().contains("match nothing"));
    }
}
