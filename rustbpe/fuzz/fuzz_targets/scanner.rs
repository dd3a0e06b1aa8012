//! The scanner splits any text as the regex does, and a cut that it offers changes nothing.

#![no_main]

use std::ops::Range;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rustbpe::scan::{Scanner, cut_from};
use rustbpe::split::{GPT4_PATTERN, Splitter};

/// Grouped, the pattern is not recognised as one that has a scanner.
static REGEXES: LazyLock<Vec<Splitter>> = LazyLock::new(|| {
    let pattern = |digits| format!("(?:{})", GPT4_PATTERN.replace("{1,3}", &format!("{{1,{digits}}}")));
    (1..=3).map(|digits| Splitter::new(&pattern(digits)).expect("the pattern compiles")).collect()
});

fuzz_target!(|data: &[u8]| {
    // Invalid bytes become U+FFFD, so that every input is a text.
    let text = String::from_utf8_lossy(data);
    for (i, regex) in REGEXES.iter().enumerate() {
        let expected: Vec<Range<usize>> = regex.chunks(&text).map(|chunk| chunk.expect("no backtracking")).collect();
        assert_eq!(Scanner::new(&text, i + 1).collect::<Vec<_>>(), expected);
        let at = cut_from(&text, text.len() / 2);
        let (left, right) = (Scanner::new(&text[..at], i + 1), Scanner::new(&text[at..], i + 1));
        let cut: Vec<Range<usize>> = left.chain(right.map(|r| r.start + at..r.end + at)).collect();
        assert_eq!(cut, expected);
    }
});
