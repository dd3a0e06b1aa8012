//! The Python module `rustbpe`: a class `Tokenizer` around the trainer and the encoder. In: Python str, ids and
//! iterables of them. Out: lists, bytes, str and numpy arrays. This file only converts between Python and Rust. It
//! contains no algorithm.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyUnicodeEncodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyList, PyString};

use crate::batch::Id;
use crate::count::ChunkCounts;
use crate::encode::Encoder;
use crate::merge::Pair;
use crate::parallel::{Plan, TEXT_OVERHEAD, TextSink};
use crate::split::{GPT4_PATTERN, Splitter};
use crate::train::learn_merges;

/// The amount of text that is read from Python before the GIL is released and the threads get the text.
const BUFFER_BYTES: usize = 1 << 18;

/// A text of fewer bytes is encoded without releasing the GIL. The encoding takes microseconds, so releasing the GIL
/// would cost more than it gains.
const KEEP_GIL_BELOW: usize = 4096;

/// How often training checks for Ctrl-C and reports progress while it merges.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// Byte-level BPE tokenizer. Ids 0 to 255 are the bytes, and id 256 + i is the i-th merge. An untrained tokenizer has
/// only the bytes. Any number of threads may use a tokenizer at once. Training replaces the merges only at its end.
///
/// A text is a str without lone surrogates, because UTF-8 cannot represent them. A lone surrogate raises
/// UnicodeEncodeError, a subclass of ValueError. If there are several texts, the error says which one is invalid.
#[pyclass(module = "rustbpe", frozen)]
struct Tokenizer {
    encoder: RwLock<Arc<Encoder>>,
}

/// An exception from Python, or an error message of this crate as a ValueError.
struct Failure(PyErr);

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self(PyValueError::new_err(message))
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self(error)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        failure.0
    }
}

type Fallible<T> = Result<T, Failure>;

impl Tokenizer {
    fn of(encoder: Encoder) -> Self {
        Self { encoder: RwLock::new(Arc::new(encoder)) }
    }

    fn encoder(&self) -> Arc<Encoder> {
        self.encoder.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Fallible<Self> {
        Ok(Self::of(Encoder::new(Splitter::new(GPT4_PATTERN)?, &[])))
    }

    /// Make a tokenizer from a split pattern and (token bytes, rank) pairs in any order. This is the inverse of
    /// get_mergeable_ranks(). Raises ValueError if the pairs are not the tokens of a byte-level BPE.
    #[staticmethod]
    fn from_mergeable_ranks(py: Python<'_>, pattern: &str, ranks: &Bound<'_, PyAny>) -> Fallible<Self> {
        let ranks: Vec<(Vec<u8>, usize)> = ranks.extract().map_err(|error| match out_of_range(py, &error) {
            true => PyValueError::new_err(format!(
                "the ranks hold a number that is neither a byte (0 to 255) nor a rank (0 or more): {error}"
            )),
            false => error,
        })?;
        py.detach(|| {
            let mut tokens = vec![None; ranks.len()];
            for (bytes, rank) in ranks {
                match tokens.get_mut(rank) {
                    Some(slot @ None) => *slot = Some(bytes),
                    Some(_) => return Err(format!("rank {rank} occurs twice, expected each rank once").into()),
                    None => {
                        let last = tokens.len() - 1;
                        return Err(
                            format!("rank {rank} leaves a gap, expected each rank from 0 to {last} once").into()
                        );
                    }
                }
            }
            let tokens: Vec<Vec<u8>> = tokens.into_iter().map(|t| t.expect("every rank should occur once")).collect();
            Ok(Self::of(Encoder::from_tokens(Splitter::new(pattern)?, &tokens)?))
        })
    }

    /// Learn merges from an iterable of str until the vocabulary has vocab_size tokens, including the 256 bytes. If the
    /// texts have too few pairs, the vocabulary is smaller. Texts are read in groups of up to buffer_size. While one
    /// group is read, all cores count the previous ones, without the GIL. Only the distinct chunks stay in memory. The
    /// default pattern is GPT-4's. progress(merges done, merges wanted) is called about ten times a second during
    /// merging.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, progress=None))]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: Py<PyAny>,
        vocab_size: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = saturating_i64)] buffer_size: i64,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
    ) -> Fallible<()> {
        let num_merges = u32::try_from(saturating_i64(vocab_size)?)
            .ok()
            .and_then(|size| size.checked_sub(256))
            .ok_or_else(|| format!("vocab_size is {vocab_size}, expected 256 (the bytes) to {}", u32::MAX))?
            as usize;
        let buffer_size = at_least_one("buffer_size", buffer_size)?;
        let splitter = Splitter::new(pattern.unwrap_or(GPT4_PATTERN))?;
        let encoder = py.detach(|| {
            let chunks = ChunkCounts::of_texts(&splitter, Plan::new(None), |sink| {
                Python::attach(|py| feed(iterator.bind(py), "the iterator", buffer_size, sink))
            })?;
            if chunks.is_empty() {
                let what = "the corpus is empty: the iterator yielded no text, or none that the pattern matches";
                return Err(what.to_string().into());
            }
            let mut last = Instant::now();
            let merges = learn_merges(chunks, num_merges, |done| {
                if last.elapsed() < REPORT_INTERVAL && done < num_merges {
                    return Ok(());
                }
                last = Instant::now();
                Python::attach(|py| {
                    py.check_signals()?;
                    progress.as_ref().map_or(Ok(()), |report| report.call1(py, (done, num_merges)).map(drop))
                })
            });
            Ok::<_, Failure>(Encoder::new(splitter, &merges?))
        })?;
        *self.encoder.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(encoder);
        Ok(())
    }

    /// The number of tokens: 256 bytes and the merges.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder().vocab_size()
    }

    /// The split pattern.
    fn get_pattern(&self) -> String {
        self.encoder().splitter().pattern().to_string()
    }

    /// The pair (token bytes, id) of every token, in the order of the ids.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, usize)> {
        self.encoder().tokens().enumerate().map(|(id, bytes)| (PyBytes::new(py, bytes), id)).collect()
    }

    /// The pair (left id, right id) of every merge, in the order of learning.
    fn get_merges(&self) -> Vec<Pair> {
        self.encoder().merges().to_vec()
    }

    /// Split a text into chunks. Merges never cross the boundaries of chunks.
    fn split(&self, text: PyBackedStr) -> Fallible<Vec<String>> {
        let encoder = self.encoder();
        let chunks = encoder.splitter().chunks(&text).map(|chunk| chunk.map(|chunk| text[chunk.range()].to_string()));
        Ok(chunks.collect::<Result<_, String>>()?)
    }

    /// Encode a text to ids, on the calling thread. Text that the pattern does not match is skipped. GPT-4's pattern
    /// matches everything.
    fn encode(&self, py: Python<'_>, text: PyBackedStr) -> Fallible<Vec<u32>> {
        let encoder = self.encoder();
        let ids = if text.len() < KEEP_GIL_BELOW { encoder.encode(&text) } else { py.detach(|| encoder.encode(&text)) };
        Ok(ids?)
    }

    /// Encode an iterable of str on all cores. Returns one list of ids per text.
    fn batch_encode<'py>(&self, py: Python<'py>, texts: Py<PyAny>) -> Fallible<Vec<Bound<'py, PyList>>> {
        let encoder = self.encoder();
        let plan = Plan::new(None);
        let encoded = py.detach(|| encoder.encode_batch::<u32, _, Failure>(plan, |sink| feed_batch(&texts, sink)))?;
        let mut ids = vec![0; encoded.len()];
        py.detach(|| encoded.write(plan.threads, &mut ids));
        let lists = encoded.offsets.windows(2).map(|w| PyList::new(py, &ids[w[0] as usize..w[1] as usize]));
        Ok(lists.collect::<PyResult<_>>()?)
    }

    /// Encode an iterable of str to two numpy arrays (tokens, offsets).
    ///
    /// Text i has the ids tokens[offsets[i]:offsets[i + 1]]. tokens is uint16 if the vocabulary has up to 65,536
    /// tokens, otherwise uint32. offsets is int64. num_threads is the maximum number of threads. The default is one
    /// thread per core.
    #[pyo3(signature = (texts, num_threads=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Py<PyAny>,
        num_threads: Option<Bound<'py, PyAny>>,
    ) -> Fallible<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let num_threads = num_threads.map(|n| at_least_one("num_threads", saturating_i64(&n)?)).transpose()?;
        let plan = Plan::new(num_threads);
        let encoder = self.encoder();
        if encoder.vocab_size() <= 1 << 16 {
            encode_flat::<u16>(py, &encoder, &texts, plan, "uint16")
        } else {
            encode_flat::<u32>(py, &encoder, &texts, plan, "uint32")
        }
    }

    /// Decode ids to text. Bytes that are not valid UTF-8 become U+FFFD.
    fn decode(&self, ids: &Bound<'_, PyAny>) -> Fallible<String> {
        Ok(String::from_utf8_lossy(&decode(&self.encoder(), ids)?).into_owned())
    }

    /// Decode ids to bytes.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: &Bound<'_, PyAny>) -> Fallible<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &decode(&self.encoder(), ids)?))
    }
}

/// A Python int, clamped to the range of i64. To the callers, an int outside this range means the same as the nearest
/// limit.
///
/// 2**70 -> i64::MAX
fn saturating_i64(value: &Bound<'_, PyAny>) -> PyResult<i64> {
    match value.extract() {
        Err(error) if out_of_range(value.py(), &error) => Ok(if value.lt(0)? { i64::MIN } else { i64::MAX }),
        extracted => extracted,
    }
}

fn out_of_range(py: Python<'_>, error: &PyErr) -> bool {
    error.is_instance_of::<PyOverflowError>(py)
}

fn at_least_one(name: &str, value: i64) -> Fallible<usize> {
    let usable = usize::try_from(value).ok().filter(|&n| n > 0);
    usable.ok_or_else(|| format!("{name} is {value}, expected 1 or more").into())
}

fn encode_flat<'py, I: Id + Element>(
    py: Python<'py>,
    encoder: &Encoder,
    texts: &Py<PyAny>,
    plan: Plan,
    dtype: &str,
) -> Fallible<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let encoded = py.detach(|| encoder.encode_batch::<I, _, Failure>(plan, |sink| feed_batch(texts, sink)))?;
    let tokens = new_array(py, encoded.len(), dtype, |out| py.detach(|| encoded.write(plan.threads, out)))?;
    let offsets = new_array(py, encoded.offsets.len(), "int64", |out| out.copy_from_slice(&encoded.offsets))?;
    Ok((tokens, offsets))
}

/// A new numpy array, filled by `fill` through the buffer protocol. This protocol is part of Python's stable ABI, so
/// the crate needs no numpy bindings.
fn new_array<'py, T: Element>(
    py: Python<'py>,
    len: usize,
    dtype: &str,
    fill: impl FnOnce(&mut [T]),
) -> PyResult<Bound<'py, PyAny>> {
    let array = py.import("numpy")?.call_method1("empty", (len, dtype))?;
    let buffer = PyBuffer::<T>::get(&array)?;
    let mut values = buffer.as_slice_ptr().expect("a new array should be contiguous");
    // SAFETY: the array is new, so nothing else refers to it, and `buffer` keeps it in place. T is a number type, so
    // every bit pattern is a valid value.
    fill(unsafe { values.as_mut() });
    Ok(array)
}

fn feed_batch(texts: &Py<PyAny>, sink: &mut TextSink<PyBackedStr>) -> Fallible<()> {
    Python::attach(|py| feed(texts.bind(py), "the batch", usize::MAX, sink))
}

/// Passes the texts of an iterable to the sink, up to `buffer_size` at a time. The texts are borrowed from Python, not
/// copied.
fn feed(iterable: &Bound<'_, PyAny>, what: &str, buffer_size: usize, sink: &mut TextSink<PyBackedStr>) -> Fallible<()> {
    if iterable.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("expected an iterable of str, got one str: put it in a list").into());
    }
    let py = iterable.py();
    let mut items = iterable.try_iter()?.enumerate();
    loop {
        let mut texts = vec![];
        let mut bytes = 0;
        while texts.len() < buffer_size && bytes < BUFFER_BYTES {
            let Some((position, item)) = items.next() else { break };
            let text = borrow_text(item?, what, position)?;
            bytes += text.len() + TEXT_OVERHEAD;
            texts.push(text);
        }
        let more = !texts.is_empty() && py.detach(|| texts.into_iter().all(&mut *sink));
        py.check_signals()?;
        if !more {
            return Ok(());
        }
    }
}

fn borrow_text(item: Bound<'_, PyAny>, what: &str, position: usize) -> PyResult<PyBackedStr> {
    let text = item.cast_into::<PyString>().map_err(|error| {
        let kind = error.into_inner().get_type().name().map_or("?".to_string(), |name| name.to_string());
        PyTypeError::new_err(format!("item {position} of {what} is {kind}, expected str"))
    })?;
    let py = text.py();
    PyBackedStr::try_from(text).inspect_err(|error| {
        if error.is_instance_of::<PyUnicodeEncodeError>(py) {
            let reason = format!("item {position} of {what} is not valid Unicode: a lone surrogate");
            error.value(py).setattr("reason", reason).expect("the reason should be writable");
        }
    })
}

fn decode(encoder: &Encoder, ids: &Bound<'_, PyAny>) -> Fallible<Vec<u8>> {
    let id_of = |item: PyResult<Bound<'_, PyAny>>| {
        let item = item?;
        item.extract::<u32>().map_err(|error| match out_of_range(item.py(), &error) {
            true => Failure::from(encoder.outside(&item)),
            false => error.into(),
        })
    };
    let ids: Vec<u32> = ids.try_iter()?.map(id_of).collect::<Fallible<_>>()?;
    Ok(encoder.decode(&ids)?)
}

#[pymodule]
mod rustbpe {
    #[pymodule_export]
    use super::Tokenizer;
}
