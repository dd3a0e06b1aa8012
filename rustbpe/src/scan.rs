//! The GPT-4 pattern by hand: many times faster than a backtracking regex, and no stack for long runs.
//!
//! ```text
//! '(?i:[sdmt]|ll|ve|re) | [^\r\n\p{L}\p{N}]?+\p{L}+ | \p{N}{1,n} |  ?[^\s\p{L}\p{N}]++[\r\n]* | \s*[\r\n] |
//! \s+(?!\S) | \s+
//! ```
//!
//! Nine chunks of ten are an ASCII word behind at most one other ASCII character, and those are measured sixteen bytes
//! at a time (`scan_short`). Everything else goes character by character (`chunk_end`), by a table of kinds that is read
//! from the regex engine's own tables, so that the two cannot disagree about Unicode.

use std::ops::Range;
use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

use crate::chunk::{Chunk, Key, SHORT};

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

/// The chunks of a text, in order; together they cover it.
pub struct Scanner<'t> {
    text: &'t [u8],
    at: usize,
    digits: usize,
    guesses: &'static Guesses,
}

impl<'t> Scanner<'t> {
    /// `digits`: the pattern's n, 1 to 3.
    pub fn new(text: &'t str, digits: usize) -> Self {
        Self { text: text.as_bytes(), at: 0, digits, guesses: &GUESSES[digits - 1] }
    }

    #[cold]
    #[inline(never)]
    fn next_slowly(&mut self) -> Chunk {
        let start = self.at;
        self.at = chunk_end(&KINDS, self.text, start, self.digits);
        Chunk::new(self.text, start..self.at)
    }
}

impl Iterator for Scanner<'_> {
    type Item = Chunk;

    #[inline(always)]
    fn next(&mut self) -> Option<Chunk> {
        let rest = self.text.get(self.at..)?;
        if let Some((len, key)) = rest.first_chunk().and_then(|bytes| scan_short(bytes, self.guesses)) {
            let start = self.at;
            self.at += len;
            return Some(Chunk { start, key });
        }
        (!rest.is_empty()).then(|| self.next_slowly())
    }
}

/// The first place from `from` on where `text` can be cut so that the chunks of the two parts are the chunks of the
/// whole; the end of `text` where there is none.
///
/// One kind of place is behind an ASCII letter and before what is no letter: a chunk that holds a letter ends there
/// at the latest, and no other chunk reaches across. The other is behind a newline and before what is no white space:
/// `[\r\n]*` and `\s*[\r\n]` take newlines up to there, and nothing that takes a newline takes anything else after it.
/// No alternative looks back, so what follows the cut splits as if it were a text of its own.
pub fn cut_from(text: &str, from: usize) -> usize {
    let text = text.as_bytes();
    let kinds = KINDS.as_slice();
    let is_cut = |&at: &usize| match text[at - 1] {
        b'a'..=b'z' | b'A'..=b'Z' => kind_at(kinds, text, at).0 != Kind::Letter,
        b'\r' | b'\n' => !matches!(kind_at(kinds, text, at).0, Kind::Space | Kind::Newline),
        _ => false,
    };
    (from.max(1)..text.len()).find(is_cut).unwrap_or(text.len())
}

/// Where the first byte is that is no ASCII letter, `from` that place on; 16 if there is none. Sixteen at once.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn end_of_letters(bytes: &[u8; 16], from: usize) -> usize {
    use std::arch::x86_64::{
        _mm_add_epi8, _mm_cmplt_epi8, _mm_loadu_si128, _mm_movemask_epi8, _mm_or_si128, _mm_set1_epi8,
    };
    // SAFETY: it reads the 16 bytes; SSE2 is a part of every x86-64.
    let letters = unsafe {
        let lower = _mm_or_si128(_mm_loadu_si128(bytes.as_ptr().cast()), _mm_set1_epi8(0x20));
        // As signed numbers, a to z are the 26 smallest.
        let shifted = _mm_add_epi8(lower, _mm_set1_epi8(i8::MIN.wrapping_sub(b'a' as i8)));
        _mm_movemask_epi8(_mm_cmplt_epi8(shifted, _mm_set1_epi8(i8::MIN + 26)))
    };
    (!letters as u32 >> from << from).trailing_zeros() as usize
}

#[cfg(not(target_arch = "x86_64"))]
use portable_end_of_letters as end_of_letters;

/// The same with the means of every machine: eight bytes in one number, and no sum carries into the next byte.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[inline(always)]
fn portable_end_of_letters(bytes: &[u8; 16], from: usize) -> usize {
    const ONES: u64 = u64::MAX / 0xff;
    const HIGHS: u64 = 0x80 * ONES;
    // The high bit of each byte that is no letter.
    let others = |bytes: u64| {
        let lower = (bytes | (0x20 * ONES)) & !HIGHS;
        let from_a = lower + (0x80 - u64::from(b'a')) * ONES;
        let after_z = lower + (0x80 - u64::from(b'z') - 1) * ONES;
        (!from_a | after_z | bytes) & HIGHS
    };
    let block = u128::from_le_bytes(*bytes);
    let others = u128::from(others((block >> 64) as u64)) << 64 | u128::from(others(block as u64));
    (others >> (8 * from) << (8 * from)).trailing_zeros() as usize / 8
}

/// What the first bytes of a chunk are to the pattern.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Byte {
    Letter,
    Digit,
    /// The space, which may open symbols too.
    Space,
    /// White space that is neither that nor a newline.
    Tab,
    Newline,
    Symbol,
    /// A symbol, but letters may make a contraction of it.
    Apostrophe,
    /// Control characters, which are rare, and parts of characters beyond ASCII.
    Rest,
}

const BYTES: [Byte; 256] = {
    let mut bytes = [Byte::Rest; 256];
    let mut byte = 0;
    while byte < 256 {
        bytes[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Byte::Letter,
            b'0'..=b'9' => Byte::Digit,
            b' ' => Byte::Space,
            b'\t' | 0x0b | 0x0c => Byte::Tab,
            b'\n' | b'\r' => Byte::Newline,
            b'\'' => Byte::Apostrophe,
            b'!'..=b'~' => Byte::Symbol,
            _ => Byte::Rest,
        };
        byte += 1;
    }
    bytes
};

/// A chunk as its first two bytes suggest it, in one number: its length, unless it is a word (lowest byte); all ones, if
/// it is (second); a bit for each `Byte` that proves the guess right where it stands behind the chunk (third).
type Guess = u32;

/// By the first and the second byte. A look-up has no branch to mispredict, and prose has no pattern to predict.
type Guesses = [[Guess; 8]; 8];

static GUESSES: [Guesses; 3] = [guesses(1), guesses(2), guesses(3)];

const fn guesses(digits: usize) -> Guesses {
    const ALL: [Byte; 8] = {
        use Byte::*;
        [Letter, Digit, Space, Tab, Newline, Symbol, Apostrophe, Rest]
    };
    let mut table = [[0; 8]; 8];
    let mut i = 0;
    while i < 64 {
        table[i / 8][i % 8] = guess(ALL[i / 8], ALL[i % 8], digits);
        i += 1;
    }
    table
}

const fn guess(first: Byte, second: Byte, digits: usize) -> Guess {
    use Byte::*;
    const WORD: Guess = 0xff << 8;
    const ANY: Guess = 0xff << 16;
    const fn behind(byte: Byte) -> Guess {
        0x10000 << byte as Guess
    }
    const REST: Guess = behind(Rest);
    const DIGIT: Guess = behind(Digit);
    const NEWLINE: Guess = behind(Newline);
    const SYMBOL: Guess = behind(Symbol) | behind(Apostrophe);
    const BLANK: Guess = behind(Space) | behind(Tab);
    match (first, second) {
        (Letter, _) | (Space | Tab | Symbol, Letter) => WORD | ANY & !REST,
        (Digit, Digit) if digits == 1 => 1 | ANY,
        (Digit, Digit) if digits == 2 => 2 | ANY,
        (Digit, Digit) => 2 | ANY & !(DIGIT | REST),
        (Digit, Rest) => 0,
        // What cannot go on: a digit, white space before a digit or a symbol, a symbol before a digit or a space.
        (Digit, _) | (_, Digit) => 1 | ANY,
        (Newline, Letter | Symbol | Apostrophe) | (Tab, Symbol | Apostrophe) => 1 | ANY,
        (Symbol | Apostrophe, Space | Tab) => 1 | ANY,
        // Symbols, and newlines behind them, go on as long as there are any.
        (Space | Symbol | Apostrophe, Symbol | Apostrophe) => 2 | ANY & !(SYMBOL | NEWLINE | REST),
        (Symbol | Apostrophe, Newline) => 2 | ANY & !NEWLINE,
        (Newline, Newline) => 2 | ANY & !(NEWLINE | BLANK | REST),
        _ => 0,
    }
}

/// A chunk that is an ASCII word of up to 15 bytes, with what opens it, or one or two other bytes: its length and its
/// key. None for others.
#[inline(always)]
fn scan_short(bytes: &[u8; 16], guesses: &Guesses) -> Option<(usize, Key)> {
    let kind = |at: usize| BYTES[usize::from(bytes[at])] as usize;
    let guess = guesses[kind(0)][kind(1)];
    // A word ends before the first byte behind its first that is no letter.
    let len = (guess & 3) as usize | end_of_letters(bytes, 1) & (guess >> 8 & 31) as usize;
    let right = guess >> 16 >> kind(len & 15) & 1 == 1;
    (right && len <= SHORT).then(|| (len, Key::of_block(u128::from_le_bytes(*bytes), len)))
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

/// End of the run of letters that begins at `at` (which may be empty).
#[inline(always)]
fn letters_end(kinds: &[Kind], text: &[u8], mut at: usize) -> usize {
    loop {
        if let Some(bytes) = text[at..].first_chunk() {
            at += end_of_letters(bytes, 0);
        }
        let (kind, len) = kind_at(kinds, text, at);
        if kind != Kind::Letter {
            return at;
        }
        at += len;
    }
}

/// End of the chunk that begins at `start`. Whatever the character, some alternative of the pattern takes it, so
/// the chunks cover the text. The alternatives are tried in the pattern's order.
fn chunk_end(kinds: &[Kind], text: &[u8], start: usize, digits: usize) -> usize {
    if text[start] == b'\'' {
        if let Some(len) = contraction(&text[start + 1..]) {
            return start + 1 + len;
        }
    }
    let (kind, len) = kind_at(kinds, text, start);
    let next = start + len;
    match kind {
        Kind::Letter => letters_end(kinds, text, next),
        Kind::Number => number_end(kinds, text, next, digits),
        Kind::Newline => whitespace_end(kinds, text, start),
        _ => match (kind, kind_at(kinds, text, next).0) {
            // One character that is no letter, number or newline may open a word: " word", "-word".
            (_, Kind::Letter) => letters_end(kinds, text, next),
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

    #[test]
    fn letters_end_at_the_same_place_by_all_means() {
        for byte in 0..=255u8 {
            for at in 0..=16 {
                let mut bytes = *b"azAZmnMNbyBYpqPQ";
                if at < 16 {
                    bytes[at] = byte;
                }
                for from in 0..2 {
                    let expected = (from..16).find(|&i| !bytes[i].is_ascii_alphabetic()).unwrap_or(16);
                    assert_eq!(end_of_letters(&bytes, from), expected, "{bytes:?} {from}");
                    assert_eq!(portable_end_of_letters(&bytes, from), expected, "{bytes:?} {from}");
                }
            }
        }
    }
}
