//! The writer of GGUF files, version 3: the header first, then one tensor at a time. Layer 6.
//!
//! Invariant: at most one tensor is in memory, and the file gets its name only when it is complete.

use std::path::Path;

use super::blocks::GgufType;
use super::read::item;
use crate::error::{Error, Result};
use crate::fsio::AtomicFile;

const ALIGNMENT: usize = 32;

/// A metadata value to write.
#[derive(Clone, Debug, PartialEq)]
pub enum MetaEntry {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Ints(Vec<i32>),
    Floats(Vec<f32>),
}

/// A tensor to write; the shape is in Hugging Face's order, rows first.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufSpec {
    pub name: String,
    pub dtype: GgufType,
    pub shape: Vec<usize>,
}

/// Writes `path`; `values_of(i)` returns the values of `tensors[i]`. Errors: a type that cannot be
/// written or does not fit a row, another number of values, values beyond the range of the type,
/// IO.
pub fn write(
    path: &Path,
    meta: &[(String, MetaEntry)],
    tensors: &[GgufSpec],
    values_of: &mut dyn FnMut(usize) -> Result<Vec<f32>>,
) -> Result<()> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((meta.len() as u64).to_le_bytes());
    for (key, value) in meta {
        text(&mut out, key);
        put(&mut out, value);
    }
    let mut offset = 0;
    for tensor in tensors {
        text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
        out.extend(tensor.dtype.number().to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += size(path, tensor)?.next_multiple_of(ALIGNMENT);
    }
    pad(&mut out);
    let mut file = AtomicFile::create(path)?;
    file.write_all(&out)?;
    for (i, tensor) in tensors.iter().enumerate() {
        let values = values_of(i)?;
        let bytes =
            tensor.dtype.narrow(&values).filter(|b| Some(b.len()) == size(path, tensor).ok());
        let Some(mut bytes) = bytes else {
            let (name, n, of) = (&tensor.name, values.len(), tensor.dtype.name());
            let message = format!("{name}: {n} values do not make {:?} of {of}", tensor.shape);
            return Err(Error::model(path, message));
        };
        let mut back = vec![0f32; values.len()];
        tensor.dtype.widen(&bytes, &mut back);
        if let Some(i) = back.iter().position(|v| !v.is_finite()) {
            let (name, of, v) = (&tensor.name, tensor.dtype.name(), values[i]);
            let message =
                format!("{name}: {v} is beyond the range of {of}; use --type f32 or bf16");
            return Err(Error::model(path, message));
        }
        pad(&mut bytes);
        file.write_all(&bytes)?;
    }
    file.commit().map(drop)
}

fn size(path: &Path, tensor: &GgufSpec) -> Result<usize> {
    let row = tensor.shape.last().copied().unwrap_or(1);
    let bytes = tensor.dtype.bytes(tensor.shape.iter().product());
    bytes.filter(|_| row.is_multiple_of(tensor.dtype.block())).ok_or_else(|| {
        let (name, of) = (&tensor.name, tensor.dtype.name());
        Error::model(
            path,
            format!("{name}: rows of {row} values are not a whole number of blocks of {of}"),
        )
    })
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &MetaEntry) {
    fn list<'a, T: 'a>(
        out: &mut Vec<u8>,
        kind: u32,
        items: &'a [T],
        one: impl Fn(&mut Vec<u8>, &'a T),
    ) {
        out.extend(item::LIST.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((items.len() as u64).to_le_bytes());
        items.iter().for_each(|i| one(out, i));
    }
    let mut kind = |n: u32| out.extend(n.to_le_bytes());
    match value {
        MetaEntry::U32(n) => {
            kind(item::U32);
            out.extend(n.to_le_bytes());
        }
        MetaEntry::F32(x) => {
            kind(item::F32);
            out.extend(x.to_le_bytes());
        }
        MetaEntry::Bool(b) => {
            kind(item::BOOL);
            out.push(u8::from(*b));
        }
        MetaEntry::Text(t) => {
            kind(item::TEXT);
            text(out, t);
        }
        MetaEntry::Texts(items) => list(out, item::TEXT, items, |out, t| text(out, t)),
        MetaEntry::Ints(items) => list(out, item::I32, items, |out, n| out.extend(n.to_le_bytes())),
        MetaEntry::Floats(items) => {
            list(out, item::F32, items, |out, x| out.extend(x.to_le_bytes()))
        }
    }
}
