//! Compares the hand-written scanner with the regex engine on the same pattern, and checks where a text can be cut.

use std::ops::Range;

use rustbpe::scan::{Scanner, cut_from};
use rustbpe::split::{GPT4_PATTERN, Splitter};

fn pattern(digits: usize) -> String {
    GPT4_PATTERN.replace("{1,3}", &format!("{{1,{digits}}}"))
}

/// The regex engine for the pattern. In a group, the pattern is not recognised as the scanner's.
fn regex(digits: usize) -> Splitter {
    let splitter = Splitter::new(&format!("(?:{})", pattern(digits))).unwrap();
    assert!(!splitter.is_scanner() && Splitter::new(&pattern(digits)).unwrap().is_scanner());
    splitter
}

fn scan(text: &str, digits: usize) -> Vec<Range<usize>> {
    Scanner::new(text, digits).map(|chunk| chunk.range()).collect()
}

fn assert_equal(regex: &Splitter, digits: usize, text: &str) {
    let expected: Vec<_> = regex.chunks(text).map(|chunk| chunk.unwrap().range()).collect();
    let found = scan(text, digits);
    if found != expected {
        let words = |ranges: Vec<Range<usize>>| ranges.into_iter().map(|r| text[r].to_string()).collect::<Vec<_>>();
        assert_eq!(words(found), words(expected), "{digits} digits, {text:?}");
    }
}

/// Pseudorandom numbers, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    fn text(&mut self, alphabet: &[char], len: usize) -> String {
        (0..len).map(|_| alphabet[self.below(alphabet.len())]).collect()
    }
}

/// At least one character of each class that the pattern tells apart, with one, two, three and four bytes.
const CLASSES: &str = "'sSdmtlLvVeErRaZz \t\u{b}\u{a0}\u{2003}\u{3000}\n\r\u{85}\u{2028}079²½Ⅷ٣𝟗-_.,!~{@`#$\0\u{7f}\u{301}éßſK字ªˇ𝒳😀\u{200d}’“—\u{fffd}\u{e000}";

#[test]
fn every_character_splits_as_the_regex_does() {
    let regex = regex(2);
    let characters: Vec<char> = ('\0'..=char::MAX).collect();
    for some in characters.chunks(64) {
        let text: String = some.iter().map(|c| format!("a{c} {c}{c}1{c}\n'{c}l.{c}e{c}12 \t{c} ")).collect();
        assert_equal(&regex, 2, &text);
    }
}

#[test]
fn short_strings_over_one_character_of_each_class_split_as_the_regex_does() {
    let alphabet =
        ['\'', 's', 'L', 'v', 'E', 'ſ', ' ', '\t', '\u{2003}', '\n', '\r', '7', '½', '-', '\u{301}', '字', '😀'];
    let num = alphabet.len();
    for digits in 1..=3 {
        let regex = regex(digits);
        for n in 0..num.pow(4) {
            let text: String = (0..4).map(|i| alphabet[n / num.pow(i) % num]).collect();
            assert_equal(&regex, digits, &text);
        }
    }
}

#[test]
fn short_strings_before_a_long_tail_split_as_the_regex_does() {
    // The scanner measures words in blocks of 16 bytes only if at least 16 bytes of text are left.
    let alphabet = ['\'', 's', 'l', ' ', '\t', '\n', '7', ',', '-', 'é', '’'];
    let num = alphabet.len();
    let regex = regex(2);
    for tail in ["aaaaaaaaaaaaaaaaaaaa", "                    ", "é a................."] {
        for n in 0..num.pow(4) {
            let text: String = (0..4).map(|i| alphabet[n / num.pow(i) % num]).collect();
            assert_equal(&regex, 2, &(text + tail));
        }
    }
}

#[test]
fn words_of_every_length_split_as_the_regex_does() {
    let regex = regex(2);
    for len in 0..70 {
        for opener in ["", " ", "-", "\t", "'", "\n", "é", "’", "7", "\u{301}", "\0"] {
            for closer in ["", " ", ",", ". ", "'s ", "é", "éa ", "字", "’s ", "7", "\n", "\0", "\u{301}", "{"] {
                for rest in ["", "a", " the end of it all, and more"] {
                    assert_equal(&regex, 2, &format!("{opener}{}{closer}{rest}", "aZbzA".repeat(14)[..len].to_owned()));
                }
            }
        }
    }
}

#[test]
fn random_strings_split_as_the_regex_does() {
    let classes: Vec<char> = CLASSES.chars().collect();
    let words: Vec<char> = "etaoinshrdluETA      ,.'-\n7é’字".chars().collect();
    let mut random = Random(1);
    for digits in 1..=3 {
        let regex = regex(digits);
        for round in 0..3000 {
            let alphabet = if round % 2 == 0 { &classes } else { &words };
            let len = random.below(120);
            assert_equal(&regex, digits, &random.text(alphabet, len));
        }
    }
}

#[test]
fn random_code_points_split_as_the_regex_does() {
    let mut random = Random(2);
    let regex = regex(2);
    for _ in 0..2000 {
        let text: String = (0..80)
            .filter_map(|_| {
                // Draws small code points as often as large ones.
                let bits = 1 + random.below(21);
                char::from_u32(random.below(1 << bits) as u32)
            })
            .collect();
        assert_equal(&regex, 2, &text);
    }
}

#[test]
fn long_runs_split_as_the_regex_does() {
    let regex = regex(2);
    for unit in [" ", "a", "\n", "!", "7", "é", "字", "\u{2003}", "\u{301}", "'", "ab ", " \n"] {
        for tail in ["", "x", " ", "\n", "."] {
            assert_equal(&regex, 2, &(unit.repeat(3000) + tail));
        }
    }
}

#[test]
fn a_million_of_one_class_take_linear_time_and_no_stack() {
    for (unit, tail, expected) in
        [(" ", "", 1), (" ", "x", 2), ("a", "", 1), ("é", "", 1), ("\n", "", 1), ("!", "\n", 1), ("7", "", 500_000)]
    {
        let text = unit.repeat(1_000_000) + tail;
        assert_eq!(scan(&text, 2).len(), expected, "{unit:?} {tail:?}");
    }
}

#[test]
fn a_cut_changes_no_chunk() {
    let alphabets: [Vec<char>; 3] = [
        CLASSES.chars().collect(),
        "ab' s\n\r\t .,é字7\u{3000}".chars().collect(),
        "etaoin shrdlu  ,.'\n7".chars().collect(),
    ];
    let mut random = Random(3);
    let mut cuts = 0;
    for round in 0..6000 {
        let len = random.below(60);
        let text = random.text(&alphabets[round % 3], len);
        let whole = scan(&text, 2);
        let mut at = 0;
        loop {
            at = cut_from(&text, at + 1);
            if at == text.len() || text.is_empty() {
                break;
            }
            cuts += 1;
            let mut parts = scan(&text[..at], 2);
            parts.extend(scan(&text[at..], 2).into_iter().map(|r| r.start + at..r.end + at));
            assert_eq!(parts, whole, "{text:?} cut at {at}");
        }
    }
    assert!(cuts > 10_000);
}

#[test]
fn parts_cover_the_text() {
    let splitter = Splitter::new(&pattern(2)).unwrap();
    let text = "Some words, and more of them.\n\nA line; 12 345 字字 don't\n".repeat(20);
    for size in 0..80 {
        let parts = splitter.parts(&text, size);
        assert!(parts.len() > 5);
        assert_eq!(parts.iter().map(|part| &text[part.clone()]).collect::<String>(), text);
        assert!(parts.iter().all(|part| !part.is_empty()));
    }
    assert_eq!(regex(2).parts(&text, 10).len(), 1);
    assert!(splitter.parts("", 10).is_empty());
}

#[test]
fn unusable_patterns_are_refused() {
    assert!(Splitter::new("(").err().unwrap().contains("does not compile"));
    assert!(Splitter::new("a*").err().unwrap().contains("match the empty string"));
    // Only a text shows that this pattern can match the empty string.
    let splitter = Splitter::new(r"a|\b").unwrap();
    assert!(splitter.chunks("ab").any(|chunk| chunk.is_err_and(|error| error.contains("empty string at byte"))));
    // Overlapping chunks would have more ids than the text has bytes.
    let splitter = Splitter::new(r"x(?<=\Kabx)|.").unwrap();
    assert!(splitter.chunks("abx").any(|chunk| chunk.is_err_and(|error| error.contains("one ends at byte 2"))));
}
