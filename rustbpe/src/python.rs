//! The Python module `rustbpe`: a class `Tokenizer` over the trainer and the encoder, and nothing of its own.

use std::time::{Duration, Instant};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyIterator, PyString};

use crate::encode::Encoder;
use crate::split::{GPT4_PATTERN, Splitter};
use crate::train::{self, ChunkCounts, Pair};

/// Text that one round of counting takes at most: bounds memory when documents are large.
const BUFFER_BYTES: usize = 64 << 20;

/// How often a long merge loop looks for Ctrl-C and reports progress.
const TICK: Duration = Duration::from_millis(100);

/// Byte-level BPE tokenizer: ids 0 to 255 are the bytes, id 256 + i the i-th merge. Untrained, it knows bytes only.
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    encoder: Encoder,
}

fn value_error(message: String) -> PyErr {
    PyValueError::new_err(message)
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        let splitter = Splitter::new(GPT4_PATTERN).map_err(value_error)?;
        Ok(Self { encoder: Encoder::new(splitter, vec![]) })
    }

    /// A tokenizer from its split pattern and (token bytes, rank) pairs in any order: the inverse of
    /// get_mergeable_ranks(). ValueError where they are not those of a byte-level BPE.
    #[staticmethod]
    fn from_mergeable_ranks(py: Python<'_>, pattern: &str, ranks: Vec<(Vec<u8>, usize)>) -> PyResult<Self> {
        py.detach(|| {
            let mut tokens = vec![None; ranks.len()];
            for (bytes, rank) in ranks {
                match tokens.get_mut(rank) {
                    Some(slot @ None) => *slot = Some(bytes),
                    Some(_) => return Err(format!("rank {rank} occurs twice")),
                    None => return Err(format!("rank {rank} leaves a gap: there are {} tokens", tokens.len())),
                }
            }
            let tokens: Vec<Vec<u8>> = tokens.into_iter().map(|t| t.expect("every rank once")).collect();
            Ok(Self { encoder: Encoder::from_tokens(Splitter::new(pattern)?, &tokens)? })
        })
        .map_err(value_error)
    }

    /// Learn the merges of a corpus, an iterable of str, up to a vocabulary of vocab_size (256 bytes included; less if
    /// the corpus runs out of pairs). Texts are taken buffer_size at a time and counted on all cores without the GIL.
    /// progress(merges done, merges wanted) is called about ten times a second while merging.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, progress=None))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let num_merges = usize::try_from(vocab_size - 256)
            .ok()
            .filter(|_| vocab_size <= i64::from(u32::MAX))
            .ok_or_else(|| value_error(format!("vocab_size is {vocab_size}, expected 256 (the bytes) or more")))?;
        let buffer_size = usize::try_from(buffer_size)
            .ok()
            .filter(|&n| n > 0)
            .ok_or_else(|| value_error(format!("buffer_size is {buffer_size}, expected 1 or more")))?;
        let splitter = Splitter::new(pattern.unwrap_or(GPT4_PATTERN)).map_err(value_error)?;
        let chunks = count_chunks(py, iterator, buffer_size, &splitter)?;
        let merges = py.detach(|| {
            let mut last = Instant::now();
            train::learn_merges(chunks, num_merges, |done| {
                if last.elapsed() < TICK && done < num_merges {
                    return Ok(());
                }
                last = Instant::now();
                Python::attach(|py| {
                    py.check_signals()?;
                    progress.as_ref().map_or(Ok(()), |report| report.call1(py, (done, num_merges)).map(drop))
                })
            })
        })?;
        self.encoder = Encoder::new(splitter, merges);
        Ok(())
    }

    /// The size of the vocabulary: 256 bytes and the merges.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder.tokens().len()
    }

    /// The split pattern.
    fn get_pattern(&self) -> &str {
        self.encoder.pattern()
    }

    /// (token bytes, id) of every token, by id.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, usize)> {
        let tokens = self.encoder.tokens().iter().enumerate();
        tokens.map(|(id, bytes)| (PyBytes::new(py, bytes), id)).collect()
    }

    /// (left id, right id) of every merge, in the order learned.
    fn get_merges(&self) -> Vec<Pair> {
        self.encoder.merges().to_vec()
    }

    /// The ids of a text.
    fn encode(&self, py: Python<'_>, text: &Bound<'_, PyString>) -> PyResult<Vec<u32>> {
        let text = PyBackedStr::try_from(text.clone())?;
        py.detach(|| self.encoder.encode(&text)).map_err(value_error)
    }

    /// The ids of each text, on all cores.
    fn batch_encode(&self, py: Python<'_>, texts: Vec<PyBackedStr>) -> PyResult<Vec<Vec<u32>>> {
        py.detach(|| self.encoder.encode_batch(&texts)).map_err(value_error)
    }

    /// The text of ids; bytes that are not UTF-8 become U+FFFD.
    fn decode(&self, ids: Vec<u32>) -> PyResult<String> {
        let bytes = self.encoder.decode(&ids).map_err(value_error)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The bytes of ids.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.encoder.decode(&ids).map_err(value_error)?))
    }
}

/// Counts the chunks of all texts, a buffer at a time. The texts are borrowed from Python, not copied.
fn count_chunks(
    py: Python<'_>,
    iterable: &Bound<'_, PyAny>,
    buffer_size: usize,
    splitter: &Splitter,
) -> PyResult<ChunkCounts> {
    if iterable.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("expected an iterable of str, got one str: put it in a list"));
    }
    let mut items = PyIterator::from_object(iterable)?.enumerate().peekable();
    let mut total = ChunkCounts::default();
    while items.peek().is_some() {
        let mut texts: Vec<PyBackedStr> = vec![];
        let mut bytes = 0;
        while texts.len() < buffer_size && bytes < BUFFER_BYTES {
            let Some((position, item)) = items.next() else { break };
            let text = borrow_text(position, &item?)?;
            bytes += text.len();
            texts.push(text);
        }
        let counts = py.detach(|| ChunkCounts::of_texts(splitter, &texts)).map_err(value_error)?;
        total = py.detach(|| total.plus(counts));
        py.check_signals()?;
    }
    if total.is_empty() {
        return Err(value_error("the corpus is empty: the iterator yielded no text".to_string()));
    }
    Ok(total)
}

fn borrow_text(position: usize, item: &Bound<'_, PyAny>) -> PyResult<PyBackedStr> {
    let text = item.cast::<PyString>().map_err(|_| {
        let kind = item.get_type().name().map_or("?".to_string(), |name| name.to_string());
        PyTypeError::new_err(format!("item {position} of the iterator is {kind}, expected str"))
    })?;
    PyBackedStr::try_from(text.clone())
        .map_err(|error| value_error(format!("item {position} of the iterator is not valid Unicode: {error}")))
}

#[pymodule]
mod rustbpe {
    #[pymodule_export]
    use super::Tokenizer;
}
