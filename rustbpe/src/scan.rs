//! Splits text by the GPT-4 pattern with hand-written code. This is many times faster than a backtracking regex engine.
//! A long run of characters cannot overflow the stack, because the code does not recurse.
//!
//! In: a text, and the maximum number n of digits in one chunk. Out: the chunks, which together cover the text. The
//! pattern is
//!
//! ```text
//! '(?i:[sdmt]|ll|ve|re) | [^\r\n\p{L}\p{N}]?+\p{L}+ | \p{N}{1,n} |  ?[^\s\p{L}\p{N}]++[\r\n]* | \s*[\r\n] |
//! \s+(?!\S) | \s+
//! ```
//!
//! `scan_short` handles about nine in ten chunks: ASCII words with at most one other ASCII character before the
//! letters, and other ASCII chunks of one or two bytes. `chunk_end` handles all other chunks, one character at a time.
//! Its table of character classes is built from the regex engine's own tables, so both classify all of Unicode in the
//! same way.

use std::ops::Range;
use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

use crate::chunk::{Chunk, Key, MAX_SHORT};

/// The classes of characters that the pattern distinguishes.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(u8)]
enum CharClass {
    /// All characters that are in no other class: punctuation, symbols, marks, control characters.
    Symbol,
    Letter,
    Number,
    /// White space except newlines.
    Space,
    Newline,
    /// Past the end of the text.
    End,
}

/// The class of every code point. This table takes about a megabyte, but one load is faster than a search.
static CHAR_CLASSES: LazyLock<Vec<CharClass>> = LazyLock::new(|| {
    let mut classes = vec![CharClass::Symbol; char::MAX as usize + 1];
    let sets = [(r"\s", CharClass::Space), (r"\p{L}", CharClass::Letter), (r"\p{N}", CharClass::Number)];
    for (set, class) in sets {
        for range in code_points(set) {
            classes[range].fill(class);
        }
    }
    classes['\r' as usize] = CharClass::Newline;
    classes['\n' as usize] = CharClass::Newline;
    classes
});

/// The code points of a regex class: `\s` -> [9..14, 32..33, ...]
fn code_points(set: &str) -> Vec<Range<usize>> {
    let hir = regex_syntax::parse(set).expect("a constant class should parse");
    let HirKind::Class(Class::Unicode(set)) = hir.kind() else { unreachable!("the class should be a Unicode class") };
    set.ranges().iter().map(|r| r.start() as usize..r.end() as usize + 1).collect()
}

/// Iterates over the chunks of a text in order.
pub struct Scanner<'t> {
    text: &'t [u8],
    at: usize,
    digits: usize,
    guesses: &'static Guesses,
}

impl<'t> Scanner<'t> {
    /// `digits` is the maximum number of digits in a chunk: 1, 2 or 3.
    pub fn new(text: &'t str, digits: usize) -> Self {
        Self { text: text.as_bytes(), at: 0, digits, guesses: &GUESSES[digits - 1] }
    }

    #[cold]
    #[inline(never)]
    fn next_slow(&mut self) -> Chunk {
        let start = self.at;
        self.at = chunk_end(&CHAR_CLASSES, self.text, start, self.digits);
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
        (!rest.is_empty()).then(|| self.next_slow())
    }
}

/// Returns the first position, at or after `from`, where `text` can be cut without changing its chunks. Returns the end
/// of `text` if there is none.
///
/// "don't stop", 1 -> 3 (before the apostrophe)
///
/// There are two kinds of cut. In both, a chunk must end at the cut:
///
/// - After an ASCII letter and before a character that is not a letter. Only letters can follow a letter in a chunk.
/// - After a newline and before a character that is not white space. Only white space can follow a newline in a chunk.
///   The newline is matched by `[\r\n]*` or `\s*[\r\n]`, so the lookahead in `\s+(?!\S)` is never tried.
///
/// No alternative looks back, so the chunks after the cut do not depend on the text before it.
pub fn cut_from(text: &str, from: usize) -> usize {
    let text = text.as_bytes();
    let classes = CHAR_CLASSES.as_slice();
    let is_cut = |&at: &usize| match text[at - 1] {
        b'a'..=b'z' | b'A'..=b'Z' => class_at(classes, text, at).0 != CharClass::Letter,
        b'\r' | b'\n' => !matches!(class_at(classes, text, at).0, CharClass::Space | CharClass::Newline),
        _ => false,
    };
    (from.max(1)..text.len()).find(is_cut).unwrap_or(text.len())
}

/// Returns the index of the first byte, at or after `from`, that is not an ASCII letter. Returns 16 if there is none.
/// Compares all 16 bytes at once.
///
/// b" the end of the ", 1 -> 4
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn end_of_letters(bytes: &[u8; 16], from: usize) -> usize {
    use std::arch::x86_64::{
        _mm_add_epi8, _mm_cmplt_epi8, _mm_loadu_si128, _mm_movemask_epi8, _mm_or_si128, _mm_set1_epi8,
    };
    // SAFETY: the load reads exactly the 16 bytes of `bytes`, and every x86-64 processor has SSE2.
    let letters = unsafe {
        let lower = _mm_or_si128(_mm_loadu_si128(bytes.as_ptr().cast()), _mm_set1_epi8(0x20));
        // Maps the letters a to z to the 26 smallest signed bytes, because SSE2 can only compare signed bytes.
        let shifted = _mm_add_epi8(lower, _mm_set1_epi8(i8::MIN.wrapping_sub(b'a' as i8)));
        _mm_movemask_epi8(_mm_cmplt_epi8(shifted, _mm_set1_epi8(i8::MIN + 26)))
    };
    (!letters as u32 >> from << from).trailing_zeros() as usize
}

#[cfg(not(target_arch = "x86_64"))]
use portable_end_of_letters as end_of_letters;

/// Does the same without SIMD instructions. Handles eight bytes in one integer. No addition carries into the next byte.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[inline(always)]
fn portable_end_of_letters(bytes: &[u8; 16], from: usize) -> usize {
    const ONES: u64 = u64::MAX / 0xff;
    const HIGHS: u64 = 0x80 * ONES;
    // Sets the high bit of each byte that is not a letter.
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

/// The classes of bytes that `scan_short` distinguishes.
#[derive(Clone, Copy)]
#[repr(u8)]
enum ByteClass {
    Letter,
    Digit,
    /// The space character. Unlike a tab, it can open a chunk of symbols.
    Space,
    /// ASCII white space except the space and newlines.
    Tab,
    Newline,
    Symbol,
    /// Like a symbol, but it may begin a contraction.
    Apostrophe,
    /// Control characters, which are rare, and all bytes of non-ASCII characters.
    Rest,
}

const BYTE_CLASSES: [ByteClass; 256] = {
    let mut classes = [ByteClass::Rest; 256];
    let mut byte = 0;
    while byte < 256 {
        classes[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => ByteClass::Letter,
            b'0'..=b'9' => ByteClass::Digit,
            b' ' => ByteClass::Space,
            b'\t' | 0x0b | 0x0c => ByteClass::Tab,
            b'\n' | b'\r' => ByteClass::Newline,
            b'\'' => ByteClass::Apostrophe,
            b'!'..=b'~' => ByteClass::Symbol,
            _ => ByteClass::Rest,
        };
        byte += 1;
    }
    classes
};

/// What the first two bytes of a chunk suggest about its length. A guess is packed into 32 bits, so that a table of 64
/// guesses takes only 256 bytes:
///
/// - Bits 0 to 7: the length of the chunk, or 0 for a word. The length of a word is measured instead.
/// - Bits 8 to 15: all ones for a word, otherwise 0.
/// - Bits 16 to 23: a set of `ByteClass`es, with bit 16 + c for class c. The guess is right if the byte after the chunk
///   is in one of these classes.
#[derive(Clone, Copy)]
struct Guess(u32);

impl Guess {
    /// A guess that is never right, for bytes that suggest nothing.
    const NONE: Self = Self(0);

    /// Guesses a word. This is right if the byte after the word is in one of the classes `followers`.
    const fn word(followers: u8) -> Self {
        Self(0xff << 8 | (followers as u32) << 16)
    }

    /// Guesses a chunk of `len` bytes (1 or 2). This is right if the byte after the chunk is in one of the classes
    /// `followers`.
    const fn of_len(len: u32, followers: u8) -> Self {
        Self(len | (followers as u32) << 16)
    }

    /// The length of the chunk, which is `word_len` for a word. Uses bit masks, because the processor would often
    /// mispredict a branch.
    #[inline(always)]
    fn len(self, word_len: usize) -> usize {
        (self.0 & 3) as usize | word_len & (self.0 >> 8 & 31) as usize
    }

    /// Whether the guess is right, given the class of the byte after the chunk.
    #[inline(always)]
    fn is_right_before(self, follower: ByteClass) -> bool {
        self.0 >> 16 >> follower as u32 & 1 == 1
    }
}

/// The guesses, indexed by the classes of the first and the second byte. The table replaces branches, which the
/// processor could not predict because they would depend on the text.
type Guesses = [[Guess; 8]; 8];

static GUESSES: [Guesses; 3] = [guesses(1), guesses(2), guesses(3)];

const fn guesses(digits: usize) -> Guesses {
    const ALL: [ByteClass; 8] = {
        use ByteClass::*;
        [Letter, Digit, Space, Tab, Newline, Symbol, Apostrophe, Rest]
    };
    let mut table = [[Guess::NONE; 8]; 8];
    let mut i = 0;
    while i < 64 {
        table[i / 8][i % 8] = guess(ALL[i / 8], ALL[i % 8], digits);
        i += 1;
    }
    table
}

const fn guess(first: ByteClass, second: ByteClass, digits: usize) -> Guess {
    use ByteClass::*;
    const fn set(class: ByteClass) -> u8 {
        1 << class as u8
    }
    const ANY: u8 = 0xff;
    const REST: u8 = set(Rest);
    const DIGIT: u8 = set(Digit);
    const NEWLINE: u8 = set(Newline);
    const SYMBOL: u8 = set(Symbol) | set(Apostrophe);
    const BLANK: u8 = set(Space) | set(Tab);
    match (first, second) {
        (Letter, _) | (Space | Tab | Symbol, Letter) => Guess::word(ANY & !REST),
        (Digit, Digit) if digits == 1 => Guess::of_len(1, ANY),
        (Digit, Digit) if digits == 2 => Guess::of_len(2, ANY),
        (Digit, Digit) => Guess::of_len(2, ANY & !(DIGIT | REST)),
        (Digit, Rest) => Guess::NONE,
        // The second byte cannot continue the chunk that the first byte begins.
        (Digit, _) | (_, Digit) => Guess::of_len(1, ANY),
        (Newline, Letter | Symbol | Apostrophe) | (Tab, Symbol | Apostrophe) => Guess::of_len(1, ANY),
        (Symbol | Apostrophe, Space | Tab) => Guess::of_len(1, ANY),
        // These chunks are as long as possible, so the guess is wrong if the next byte could extend the chunk.
        (Space | Symbol | Apostrophe, Symbol | Apostrophe) => Guess::of_len(2, ANY & !(SYMBOL | NEWLINE | REST)),
        (Symbol | Apostrophe, Newline) => Guess::of_len(2, ANY & !NEWLINE),
        (Newline, Newline) => Guess::of_len(2, ANY & !(NEWLINE | BLANK | REST)),
        _ => Guess::NONE,
    }
}

/// The length and the key of the chunk at the start of `bytes`, or None if the guess is wrong. The guess can be an
/// ASCII word of up to 15 bytes, including the character before the letters, or another chunk of one or two bytes.
///
/// b" the end of the " -> (4, the key of " the")
#[inline(always)]
fn scan_short(bytes: &[u8; 16], guesses: &Guesses) -> Option<(usize, Key)> {
    let class = |at: usize| BYTE_CLASSES[usize::from(bytes[at])];
    let guess = guesses[class(0) as usize][class(1) as usize];
    // Starts at index 1, because the first byte of a word need not be a letter.
    let len = guess.len(end_of_letters(bytes, 1));
    let is_right = guess.is_right_before(class(len & 15));
    (is_right && len <= MAX_SHORT).then(|| (len, Key::of_block(u128::from_le_bytes(*bytes), len)))
}

/// The class and the byte length of the character at `at`, or (End, 0) past the end. `text` must be valid UTF-8, and
/// `at` must be a character boundary.
///
/// "é!", 0 -> (Letter, 2)
#[inline(always)]
fn class_at(classes: &[CharClass], text: &[u8], at: usize) -> (CharClass, usize) {
    let Some(&first) = text.get(at) else { return (CharClass::End, 0) };
    if first < 0x80 {
        return (classes[first as usize], 1);
    }
    let tail = |i: usize| (text[at + i] & 0x3f) as usize;
    match first {
        0x80..0xe0 => (classes[(first as usize & 0x1f) << 6 | tail(1)], 2),
        0xe0..0xf0 => (classes[(first as usize & 0x0f) << 12 | tail(1) << 6 | tail(2)], 3),
        _ => (classes[(first as usize & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3)], 4),
    }
}

/// The end of the run that begins at `at` and has only characters of the class `wanted`. The run may be empty.
#[inline(always)]
fn run_end(classes: &[CharClass], text: &[u8], mut at: usize, wanted: CharClass) -> usize {
    loop {
        let (class, len) = class_at(classes, text, at);
        if class != wanted {
            return at;
        }
        at += len;
    }
}

/// The end of the run of letters that begins at `at`. The run may be empty.
#[inline(always)]
fn letters_end(classes: &[CharClass], text: &[u8], mut at: usize) -> usize {
    loop {
        if let Some(bytes) = text[at..].first_chunk() {
            at += end_of_letters(bytes, 0);
        }
        let (class, len) = class_at(classes, text, at);
        if class != CharClass::Letter {
            return at;
        }
        at += len;
    }
}

/// The end of the chunk that begins at `start`. Tries the alternatives in the order of the pattern. There is an
/// alternative for every character, so the chunks cover the text.
fn chunk_end(classes: &[CharClass], text: &[u8], start: usize, digits: usize) -> usize {
    if text[start] == b'\'' {
        if let Some(len) = contraction(&text[start + 1..]) {
            return start + 1 + len;
        }
    }
    let (class, len) = class_at(classes, text, start);
    let next = start + len;
    match class {
        CharClass::Letter => letters_end(classes, text, next),
        CharClass::Number => number_end(classes, text, next, digits),
        CharClass::Newline => whitespace_end(classes, text, start),
        _ => match (class, class_at(classes, text, next).0) {
            // A word may begin with one character that is not a letter, number or newline: " word", "-word".
            (_, CharClass::Letter) => letters_end(classes, text, next),
            (CharClass::Symbol, _) => symbols_end(classes, text, next),
            (_, CharClass::Symbol) if text[start] == b' ' => symbols_end(classes, text, next),
            _ => whitespace_end(classes, text, start),
        },
    }
}

/// The number of bytes that `(?i:[sdmt]|ll|ve|re)` matches at the start of `text`. The long s (U+017F) counts as an s,
/// because the pattern ignores case.
fn contraction(text: &[u8]) -> Option<usize> {
    let second = text.get(1).map(u8::to_ascii_lowercase);
    match (text.first()?.to_ascii_lowercase(), second) {
        (b's' | b'd' | b'm' | b't', _) => Some(1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(2),
        (0xc5, Some(0xbf)) => Some(2),
        _ => None,
    }
}

fn number_end(classes: &[CharClass], text: &[u8], mut at: usize, digits: usize) -> usize {
    for _ in 1..digits {
        let (class, len) = class_at(classes, text, at);
        if class != CharClass::Number {
            break;
        }
        at += len;
    }
    at
}

fn symbols_end(classes: &[CharClass], text: &[u8], at: usize) -> usize {
    let at = run_end(classes, text, at, CharClass::Symbol);
    run_end(classes, text, at, CharClass::Newline)
}

/// The end of the match of `\s*[\r\n]|\s+(?!\S)|\s+` in the run of white space that begins at `start`:
///
/// - If the run contains a newline, the match ends after the last newline.
/// - If the run has no newline and ends the text, the match is the whole run.
/// - Otherwise, the match omits the last character of the run, which may begin the next word. But a run of only one
///   character is matched completely.
fn whitespace_end(classes: &[CharClass], text: &[u8], start: usize) -> usize {
    let (mut at, mut last, mut after_newline) = (start, start, start);
    loop {
        let (class, len) = class_at(classes, text, at);
        match class {
            CharClass::Newline => after_newline = at + len,
            CharClass::Space => {}
            _ if after_newline > start => return after_newline,
            CharClass::End => return at,
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
    fn end_of_letters_is_the_same_with_and_without_simd() {
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
