//! A chunk of text and its key. In: the bytes of a chunk. Out: a 128-bit key. The key of a short chunk contains the
//! whole chunk, so two short chunks are equal if their keys are equal.

use std::ops::Range;

/// The maximum length of a short chunk in bytes. A key has 16 bytes, and one of them holds the length.
pub const MAX_SHORT: usize = 15;

/// A chunk, given by its start in the text and its key.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Chunk {
    pub start: usize,
    pub key: Key,
}

/// The key of a short chunk holds its bytes, and its length in the highest byte. The length distinguishes chunks that
/// end in zero bytes. The key of a longer chunk holds 0xff in the highest byte, and the chunk's length in the others.
/// No chunk has the key 0, so 0 can mark an empty slot.
///
/// b"ab" -> 0x02000000000000000000000000006261
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Key(u128);

/// MASKS[n] keeps the lowest n bytes.
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
    /// The key of the first `len` bytes of `block`; `len` is 1 to 15.
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

    /// The length of the chunk in bytes.
    #[inline(always)]
    pub fn chunk_len(self) -> usize {
        if self.is_short() { (self.0 >> 120) as usize } else { self.0 as usize }
    }

    /// The bytes of the key. If the chunk is short, the first `chunk_len()` bytes are the chunk.
    pub fn bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// Multiplies the two halves of the key, and XORs the two halves of the product. One multiplication mixes all bits.
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
