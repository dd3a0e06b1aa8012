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

fn scan(text: &str, digits: usize) -> impl Iterator<Item = Range<usize>> {
    Scanner::new(text, digits).map(|chunk| chunk.range())
}

fuzz_target!(|data: &[u8]| {
    // Invalid bytes become U+FFFD, so that every input is a text.
    let text = String::from_utf8_lossy(data);
    for (digits, regex) in (1..).zip(REGEXES.iter()) {
        let expected: Vec<_> = regex.chunks(&text).map(|chunk| chunk.expect("no backtracking").range()).collect();
        assert_eq!(scan(&text, digits).collect::<Vec<_>>(), expected);
        let at = cut_from(&text, text.len() / 2);
        let right = scan(&text[at..], digits).map(|range| range.start + at..range.end + at);
        assert_eq!(scan(&text[..at], digits).chain(right).collect::<Vec<_>>(), expected);
    }
});
