//! A chunk of text, and the number by which a short one is known.

use std::ops::Range;

/// The longest chunk that fits into a key beside its length.
pub const MAX_SHORT: usize = 15;

/// Where a chunk lies in its text, and its key.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Chunk {
    pub start: usize,
    pub key: Key,
}

/// A short chunk: its bytes, with its length on top, so that chunks that end in zeros differ. A longer one: only that
/// it is longer, and its length. No key is 0.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Key(u128);

/// The lowest so many bytes.
const MASKS: [u128; 16] = {
    let mut masks = [0; 16];
    let mut len = 1;
    while len < 16 {
        masks[len] = masks[len - 1] << 8 | 0xff;
        len += 1;
    }
    masks
};

const LONG: u128 = 0xff << 120;

impl Key {
    /// The key of the first `len` bytes of `block`, 1 to 15.
    #[inline(always)]
    pub fn of_block(block: u128, len: usize) -> Self {
        Self(block & MASKS[len & 15] | (len as u128) << 120)
    }

    pub fn of(chunk: &[u8]) -> Self {
        let mut block = [0; 16];
        if chunk.len() > MAX_SHORT {
            return Self(LONG | chunk.len() as u128);
        }
        block[..chunk.len()].copy_from_slice(chunk);
        Self::of_block(u128::from_le_bytes(block), chunk.len())
    }

    #[inline(always)]
    pub fn is_short(self) -> bool {
        self.0 < LONG
    }

    /// The length of the chunk.
    #[inline(always)]
    pub fn chunk_len(self) -> usize {
        if self.is_short() { (self.0 >> 120) as usize } else { self.0 as usize }
    }

    /// The bytes of a short chunk are the first `chunk_len()` of these.
    pub fn bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// Both halves of the product of both halves: one multiplication mixes all bits.
    #[inline(always)]
    pub fn hash(self) -> usize {
        let low = self.0 as u64 ^ 0x9e37_79b9_7f4a_7c15;
        let high = (self.0 >> 64) as u64 ^ 0xd1b5_4a32_d192_ed03;
        let product = u128::from(low) * u128::from(high);
        (product as u64 ^ (product >> 64) as u64) as usize
    }
}

impl Chunk {
    pub fn new(text: &[u8], range: Range<usize>) -> Self {
        Self { start: range.start, key: Key::of(&text[range]) }
    }

    pub fn range(self) -> Range<usize> {
        self.start..self.start + self.key.chunk_len()
    }
}
