//! The GPT-4 pattern by hand: many times faster than a backtracking regex, and no stack for long runs.
//!
//! ```text
//! '(?i:[sdmt]|ll|ve|re) | [^\r\n\p{L}\p{N}]?+\p{L}+ | \p{N}{1,n} |  ?[^\s\p{L}\p{N}]++[\r\n]* | \s*[\r\n] |
//! \s+(?!\S) | \s+
//! ```
//!
//! Nine chunks of ten are an ASCII word behind at most one other ASCII character, and those are measured sixteen bytes
//! at a time (`scan_word`). Everything else goes character by character (`chunk_end`), by a table of kinds that is read
//! from the regex engine's own tables, so that the two cannot disagree about Unicode.

use std::ops::Range;
use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

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

/// The places of the chunks of a text, in order; together they cover it.
pub struct Scanner<'t> {
    text: &'t [u8],
    at: usize,
    digits: usize,
    guesses: &'static Guesses,
    kinds: &'static [Kind],
}

impl<'t> Scanner<'t> {
    /// `digits`: the pattern's n, 1 to 3.
    pub fn new(text: &'t str, digits: usize) -> Self {
        Self { text: text.as_bytes(), at: 0, digits, guesses: &GUESSES[digits - 1], kinds: &KINDS }
    }
}

impl Iterator for Scanner<'_> {
    type Item = Range<usize>;

    #[inline(always)]
    fn next(&mut self) -> Option<Range<usize>> {
        let start = self.at;
        if start >= self.text.len() {
            return None;
        }
        self.at = match scan_short(self.text, start, self.guesses) {
            Some(end) => end,
            None => chunk_end(self.kinds, self.text, start, self.digits),
        };
        Some(start..self.at)
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

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x80 * ONES;
const HIGHS2: u128 = (HIGHS as u128) << 64 | HIGHS as u128;

/// The high bit of each of eight bytes that is an ASCII letter.
#[inline(always)]
fn ascii_letters(bytes: u64) -> u64 {
    let lower = (bytes | (0x20 * ONES)) & !HIGHS;
    let from_a = lower + (0x80 - u64::from(b'a')) * ONES;
    let after_z = lower + (0x80 - u64::from(b'z') - 1) * ONES;
    from_a & !after_z & !bytes & HIGHS
}

/// How many bytes from `at` on are ASCII letters, up to 16; None where fewer than 16 bytes are left.
#[inline(always)]
fn ascii_run(text: &[u8], at: usize) -> Option<usize> {
    let block: [u8; 16] = text.get(at..at + 16)?.try_into().ok()?;
    let block = u128::from_le_bytes(block);
    let (low, high) = (block as u64, (block >> 64) as u64);
    let letters = u128::from(ascii_letters(high)) << 64 | u128::from(ascii_letters(low));
    let others = !letters & HIGHS2;
    Some(others.trailing_zeros() as usize / 8)
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

/// A chunk as its first two bytes suggest it.
#[derive(Clone, Copy)]
struct Guess {
    len: u8,
    /// All ones in a word: the letters behind the first byte count too.
    letters: u8,
    /// A bit for each `Byte`: which ones behind the chunk prove the guess right.
    behind: u8,
}

/// By the first and the second byte. A look-up has no branch to mispredict, and prose has no pattern to predict.
type Guesses = [[Guess; 8]; 8];

static GUESSES: [Guesses; 3] = [guesses(1), guesses(2), guesses(3)];

const fn guesses(digits: usize) -> Guesses {
    use Byte::*;
    const ALL: [Byte; 8] = [Letter, Digit, Space, Tab, Newline, Symbol, Apostrophe, Rest];
    const LETTER: u8 = 1 << Letter as u8;
    const DIGIT: u8 = 1 << Digit as u8;
    const BLANK: u8 = 1 << Space as u8 | 1 << Tab as u8;
    const NEWLINE: u8 = 1 << Newline as u8;
    const SYMBOL: u8 = 1 << Symbol as u8 | 1 << Apostrophe as u8;
    let mut table = [[Guess { len: 1, letters: 0, behind: 0 }; 8]; 8];
    let mut i = 0;
    while i < 64 {
        let (first, second) = (ALL[i / 8], ALL[i % 8]);
        let (len, letters, behind) = match (first, second) {
            (Letter, _) | (Space | Tab | Symbol, Letter) => (1, 0xff, !(1 << Rest as u8)),
            (Digit, Digit) => match digits {
                1 => (1, 0, 0xff),
                2 => (2, 0, 0xff),
                _ => (1, 0, 0),
            },
            (Digit, Rest) => (1, 0, 0),
            // One that cannot go on: a digit before none, white space before a digit or a symbol, and the like.
            (Digit, _) | (_, Digit) => (1, 0, 0xff),
            (Newline, Letter | Symbol | Apostrophe) | (Tab, Symbol | Apostrophe) => (1, 0, 0xff),
            (Symbol | Apostrophe, Space | Tab) => (1, 0, 0xff),
            // Symbols, then newlines, as long as there are any.
            (Space | Symbol | Apostrophe, Symbol | Apostrophe) => (2, 0, LETTER | DIGIT | BLANK),
            (Symbol | Apostrophe, Newline) => (2, 0, !NEWLINE),
            (Newline, Newline) => (2, 0, LETTER | DIGIT | SYMBOL),
            _ => (1, 0, 0),
        };
        table[i / 8][i % 8] = Guess { len, letters, behind };
        i += 1;
    }
    table
}

/// End of a chunk that is an ASCII word of up to 15 bytes, with what opens it, or one or two other bytes. None for other
/// chunks, and for the last of a text.
#[inline(always)]
fn scan_short(text: &[u8], start: usize, guesses: &Guesses) -> Option<usize> {
    let run = ascii_run(text, start + 1)?;
    let kind = |at: usize| BYTES[usize::from(text[at])] as usize;
    let guess = guesses[kind(start)][kind(start + 1)];
    let end = start + usize::from(guess.len) + (run & usize::from(guess.letters) & 15);
    (guess.behind >> kind(end) & 1 == 1 && run < 15).then_some(end)
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
        at += ascii_run(text, at).unwrap_or(0);
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
