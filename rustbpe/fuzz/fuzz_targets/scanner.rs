//! Fuzzes the scanner. In: any bytes, as text. It must split the text as the regex engine does, and cutting the text
//! where `cut_from` says must not change the chunks.

#![no_main]

use std::ops::Range;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rustbpe::scan::{Scanner, cut_from};
use rustbpe::split::{GPT4_PATTERN, Splitter};

/// In a group, the pattern is not recognised as the scanner's, so the regex engine runs it.
static REGEXES: LazyLock<Vec<Splitter>> = LazyLock::new(|| {
    let pattern = |digits| format!("(?:{})", GPT4_PATTERN.replace("{1,3}", &format!("{{1,{digits}}}")));
    (1..=3).map(|digits| Splitter::new(&pattern(digits)).expect("the pattern should compile")).collect()
});

fn scan(text: &str, digits: usize) -> impl Iterator<Item = Range<usize>> {
    Scanner::new(text, digits).map(|chunk| chunk.range())
}

fuzz_target!(|data: &[u8]| {
    // Invalid bytes become U+FFFD, so that every input is a text.
    let text = String::from_utf8_lossy(data);
    for (digits, regex) in (1..).zip(REGEXES.iter()) {
        let expected: Vec<_> = regex
            .chunks(&text)
            .map(|chunk| chunk.expect("the pattern should stay within the backtracking limit").range())
            .collect();
        assert_eq!(scan(&text, digits).collect::<Vec<_>>(), expected);
        let at = cut_from(&text, text.len() / 2);
        let right = scan(&text[at..], digits).map(|range| range.start + at..range.end + at);
        assert_eq!(scan(&text[..at], digits).chain(right).collect::<Vec<_>>(), expected);
    }
});
