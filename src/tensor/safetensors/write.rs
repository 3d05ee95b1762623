//! The writer of safetensors files: the header first, then one tensor at a time. Layer 1.
//!
//! Invariant: at most one tensor is in memory, and the file gets its name only when it is complete.

use std::collections::BTreeSet;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::HostDtype;
use crate::error::{Error, Result};
use crate::fsio::{AtomicFile, Written};

/// Name, dtype and shape of a tensor to write.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: HostDtype, // F32, F16 or BF16; Other(U8) for quantized codes
    pub shape: Vec<usize>,
}

/// Writes `tensors` to `path`. Calls `bytes_of(i, &tensors[i])` for the little-endian values of
/// each tensor in the order of the file: wider dtypes first, so that every tensor is aligned to its
/// dtype, and otherwise the given order. `metadata` is customarily `[("format", "pt")]`. Errors: a
/// name occurs twice, a dtype cannot be written, the callback returns another number of bytes, and
/// IO. After an error the previous file is unchanged.
pub fn write(
    path: impl AsRef<Path>,
    tensors: &[TensorSpec],
    metadata: &[(&str, &str)],
    bytes_of: &mut dyn FnMut(usize, &TensorSpec) -> Result<Vec<u8>>,
) -> Result<Written> {
    let path = path.as_ref();
    let (header, order) = header(path, tensors, metadata)?;
    let mut file = AtomicFile::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (i, tensor, expected) in order {
        let bytes = bytes_of(i, tensor)?;
        if bytes.len() != expected {
            let message = format!(
                "{}: {} bytes were given, its shape needs {expected}",
                tensor.name,
                bytes.len()
            );
            return Err(Error::model(path, message));
        }
        file.write_all(&bytes)?;
    }
    file.commit()
}

type Order<'a> = Vec<(usize, &'a TensorSpec, usize)>; // index, tensor, bytes

fn header<'a>(
    path: &Path,
    tensors: &'a [TensorSpec],
    metadata: &[(&str, &str)],
) -> Result<(Vec<u8>, Order<'a>)> {
    let mut order: Order = Vec::with_capacity(tensors.len());
    let mut seen = BTreeSet::new();
    for (i, tensor) in tensors.iter().enumerate() {
        let name = &tensor.name;
        if name == "__metadata__" || !seen.insert(name) {
            return Err(Error::model(path, format!("{name}: two tensors cannot have one name")));
        }
        let bytes =
            if tensor.dtype == HostDtype::Other(Dtype::U8) { Some(1) } else { tensor.dtype.size() };
        let size = bytes.and_then(|s| tensor.shape.iter().try_fold(s, |n, d| n.checked_mul(*d)));
        let Some(size) = size else {
            let message =
                format!("{name}: {} {:?} cannot be written", tensor.dtype.name(), tensor.shape);
            return Err(Error::model(path, message));
        };
        order.push((i, tensor, size));
    }
    order.sort_by_key(|(_, tensor, _)| std::cmp::Reverse(tensor.dtype.size())); // a stable sort
    let mut map = Map::new();
    if !metadata.is_empty() {
        let pairs = metadata.iter().map(|(k, v)| (k.to_string(), Value::from(*v)));
        map.insert("__metadata__".into(), Value::Object(pairs.collect()));
    }
    let mut at = 0usize;
    for (_, tensor, size) in &order {
        let end = at.saturating_add(*size);
        let entry = json!({ "dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [at, end] });
        map.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok((text, order))
}
