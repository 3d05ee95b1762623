//! safetensors files: reading maps them, writing streams them. Layer 1.
//!
//! Invariant: the bytes of a tensor that [`SafeFolder::get`] returns agree with its dtype and
//! shape, and the header of its file was checked. The caller checks everything else (NaN, the
//! shapes of another model).

mod write;

use std::collections::btree_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ::safetensors::{Dtype, SafeTensors, tensor::Metadata};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::fsio;

pub use write::{TensorSpec, write};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The stored dtype of a tensor. The engine reads the first three; errors name the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostDtype {
    F32,
    F16,
    BF16,
    Other(Dtype),
}

impl HostDtype {
    /// Name in a safetensors header: `F32`, `BF16`, `I64` ...
    pub fn name(self) -> String {
        match self {
            HostDtype::F32 => "F32".into(),
            HostDtype::F16 => "F16".into(),
            HostDtype::BF16 => "BF16".into(),
            HostDtype::Other(dtype) => format!("{dtype}"),
        }
    }

    /// Name in config.json: `float32`, `float16`, `bfloat16`. None for other dtypes.
    pub fn torch_name(self) -> Option<&'static str> {
        match self {
            HostDtype::F32 => Some("float32"),
            HostDtype::F16 => Some("float16"),
            HostDtype::BF16 => Some("bfloat16"),
            HostDtype::Other(_) => None,
        }
    }

    /// The dtype that `dtype` or `torch_dtype` of a config.json names, with or without the prefix
    /// `torch.`.
    pub fn from_torch_name(name: &str) -> Option<Self> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" | "float" => Some(HostDtype::F32),
            "float16" | "half" => Some(HostDtype::F16),
            "bfloat16" => Some(HostDtype::BF16),
            _ => None,
        }
    }

    /// Bytes of one value. None for a dtype that the engine does not read.
    pub fn size(self) -> Option<usize> {
        match self {
            HostDtype::F32 => Some(4),
            HostDtype::F16 | HostDtype::BF16 => Some(2),
            HostDtype::Other(_) => None,
        }
    }

    /// The values as little-endian bytes of this dtype, rounded to nearest even. Error:
    /// [`HostDtype::Other`].
    pub fn encode(self, values: &[f32]) -> Result<Vec<u8>> {
        Ok(match self {
            HostDtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            HostDtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            HostDtype::BF16 => {
                values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
            }
            HostDtype::Other(_) => {
                return Err(Error::Config(format!(
                    "cannot write {}: use F32, F16 or BF16",
                    self.name()
                )));
            }
        })
    }

    fn from_header(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => HostDtype::F32,
            Dtype::F16 => HostDtype::F16,
            Dtype::BF16 => HostDtype::BF16,
            other => HostDtype::Other(other),
        }
    }
}

/// One tensor of a mapped file. `bytes` may be unaligned: read them through the methods.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    pub name: &'a str,
    pub dtype: HostDtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8], // dtype.size() x product of shape, little-endian, row-major
    pub path: &'a Path,  // file of the tensor, for messages
}

impl TensorView<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Converts to f32 into `out` `[len]`. Exact for all three dtypes. Errors: another dtype,
    /// another length.
    pub fn to_f32_into(&self, out: &mut [f32]) -> Result<()> {
        if out.len() != self.len() {
            let message =
                format!("{} has {} values, but {} are needed", self.name, self.len(), out.len());
            return Err(Error::model(self.path, message));
        }
        match self.dtype {
            HostDtype::F32 => widen(self.bytes, out, f32::from_le_bytes),
            HostDtype::F16 => widen(self.bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            HostDtype::BF16 => widen(self.bytes, out, |b: [u8; 2]| {
                f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)
            }),
            HostDtype::Other(_) => {
                let message = format!(
                    "{} is stored as {}; F32, F16 and BF16 can be read",
                    self.name,
                    self.dtype.name()
                );
                return Err(Error::model(self.path, message));
            }
        }
        Ok(())
    }

    /// Row-major index of the first NaN or infinity. None also for dtypes that the engine does not
    /// read.
    pub fn first_non_finite(&self) -> Option<usize> {
        first_non_finite(self.dtype, self.bytes)
    }
}

/// Index of the first NaN or infinity among little-endian values of `dtype`.
pub fn first_non_finite(dtype: HostDtype, bytes: &[u8]) -> Option<usize> {
    fn scan<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool + Sync) -> Option<usize> {
        const BLOCK: usize = 4096; // no branch within a block, so that the compiler vectorises
        let blocks = bytes.as_chunks::<N>().0.par_chunks(BLOCK).with_min_len(16).enumerate();
        // The threads also share the page faults of a file that is read for the first time.
        blocks
            .filter_map(|(i, block)| {
                let any = block.iter().fold(false, |any, b| any | bad(*b));
                any.then(|| block.iter().position(|b| bad(*b)).map(|j| i * BLOCK + j)).flatten()
            })
            .min()
    }
    match dtype {
        HostDtype::F32 => scan(bytes, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        HostDtype::F16 => scan(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        HostDtype::BF16 => scan(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        HostDtype::Other(_) => None,
    }
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: memmap2::Mmap,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: HostDtype,
    shape: Vec<usize>,
    start: usize, // in the file
    end: usize,
}

/// All tensors of a model folder or of one file, mapped.
#[derive(Debug)]
pub struct SafeFolder {
    path: PathBuf,
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl SafeFolder {
    /// Opens `dir/model.safetensors` if it exists, else the shards that
    /// `dir/model.safetensors.index.json` names. Errors: neither exists; a file is truncated or
    /// contradicts its header; two shards hold the same name; a shard lacks a name that the index
    /// promises. Names that only a shard has are kept: the caller compares the names with those it
    /// expects.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            return Err(Error::model(
                dir,
                "is not a folder: give a folder that holds config.json and model.safetensors",
            ));
        }
        let mut folder = Self::empty(dir);
        if dir.join(SINGLE).exists() {
            folder.add(dir.join(SINGLE))?;
            return Ok(folder);
        }
        let index_path = dir.join(INDEX);
        if !index_path.exists() {
            let mut message = format!("has no weights: looked for {SINGLE} and {INDEX}");
            if has_pickles(dir) {
                message += "; it holds *.bin files, which temper does not read: load the folder in transformers and \
                            save_pretrained() it, which writes safetensors";
            }
            return Err(Error::model(dir, message));
        }
        let weight_map = read_index(&index_path)?;
        let files: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
        for file in files {
            let path = dir.join(file);
            if !path.exists() {
                return Err(Error::model(
                    path,
                    format!("is named in {INDEX} but is not in the folder: download it again"),
                ));
            }
            folder.add(path)?;
        }
        let missing: Vec<String> = weight_map
            .iter()
            .filter(|(name, file)| folder.shard_of(name).is_none_or(|path| !path.ends_with(file)))
            .map(|(name, file)| format!("{name} in {file}"))
            .collect();
        if !missing.is_empty() {
            let message = format!(
                "promises tensors that the shards do not hold:\n  {}",
                missing.join("\n  ")
            );
            return Err(Error::model(index_path, message));
        }
        Ok(folder)
    }

    /// Whether the folder has weights to open.
    pub fn exists(dir: &Path) -> bool {
        dir.join(SINGLE).exists() || dir.join(INDEX).exists()
    }

    /// Opens one file by its own name (an adapter, an optimizer state). Errors: see
    /// [`open`](Self::open).
    pub fn open_file(path: impl AsRef<Path>) -> Result<Self> {
        let mut folder = Self::empty(path.as_ref());
        folder.add(path.as_ref().to_path_buf())?;
        Ok(folder)
    }

    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.entries.get_key_value(name)?;
        let shard = self.shards.get(entry.shard)?;
        let bytes = shard.map.get(entry.start..entry.end)?;
        Some(TensorView { name, dtype: entry.dtype, shape: &entry.shape, bytes, path: &shard.path })
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The header's `__metadata__`. For shards the union; the first shard with a key wins.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn empty(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            shards: Vec::new(),
            entries: BTreeMap::new(),
            metadata: BTreeMap::new(),
        }
    }

    fn shard_of(&self, name: &str) -> Option<&Path> {
        self.entries.get(name).and_then(|e| self.shards.get(e.shard)).map(|s| s.path.as_path())
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let map = fsio::map(&path)?;
        let (header_len, header) =
            SafeTensors::read_metadata(&map).map_err(|e| broken(&path, &map, &e))?;
        let data = header_len + 8;
        let shard = self.shards.len();
        let mut twice = Vec::new();
        for (name, entry) in entries_of(&header, shard, data) {
            match self.entries.entry(name) {
                Slot::Vacant(slot) => {
                    slot.insert(entry);
                }
                Slot::Occupied(slot) => twice.push(slot.key().clone()),
            }
        }
        if let Some(first) = twice.first() {
            let other = self.shard_of(first).unwrap_or(Path::new("another shard"));
            let message =
                format!("holds tensors that {} also holds: {}", other.display(), twice.join(", "));
            return Err(Error::model(path, message));
        }
        for (key, value) in header.metadata().iter().flatten() {
            self.metadata.entry(key.clone()).or_insert_with(|| value.clone());
        }
        self.shards.push(Shard { path, map });
        Ok(())
    }
}

fn entries_of(
    header: &Metadata,
    shard: usize,
    data: usize,
) -> impl Iterator<Item = (String, Entry)> + '_ {
    header.offset_keys().into_iter().filter_map(move |name| {
        let info = header.info(&name)?;
        let (start, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
        let dtype = HostDtype::from_header(info.dtype);
        Some((name, Entry { shard, dtype, shape: info.shape.clone(), start, end }))
    })
}

fn widen<const N: usize>(bytes: &[u8], out: &mut [f32], one: impl Fn([u8; N]) -> f32 + Sync) {
    const PART: usize = 1 << 16;
    let values = bytes.as_chunks::<N>().0;
    out.par_chunks_mut(PART).zip(values.par_chunks(PART)).for_each(|(out, values)| {
        for (to, from) in out.iter_mut().zip(values) {
            *to = one(*from);
        }
    });
}

fn has_pickles(dir: &Path) -> bool {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files.map(|f| f.file_name()).any(|n| Path::new(&n).extension().is_some_and(|e| e == "bin"))
}

/// The `weight_map` of an index: from tensor name to file name, which must be a plain name in the
/// same folder.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(&fsio::read(path)?).map_err(|e| {
        Error::model(
            path,
            format!("is not an index of safetensors shards ({e}): download it again"),
        )
    })?;
    for file in index.weight_map.values() {
        if Path::new(file).file_name().is_none_or(|name| name != file.as_str()) {
            return Err(Error::model(
                path,
                format!("names the shard {file:?}; it must be a plain file name"),
            ));
        }
    }
    if index.weight_map.is_empty() {
        return Err(Error::model(path, "has an empty weight_map: download it again"));
    }
    Ok(index.weight_map)
}

/// The error for a file that the header check refused, with the sizes that disagree.
fn broken(path: &Path, bytes: &[u8], error: &::safetensors::SafeTensorError) -> Error {
    let again = "download or save it again";
    if bytes.starts_with(b"version https://git-lfs") {
        return Error::model(
            path,
            "is a Git LFS pointer, not the weights: run `git lfs pull`, or `hf download`",
        );
    }
    let Some((head, rest)) = bytes.split_first_chunk::<8>() else {
        return Error::model(
            path,
            format!("is truncated: {} bytes, a header needs at least 8; {again}", bytes.len()),
        );
    };
    let header = u64::from_le_bytes(*head);
    if header > rest.len() as u64 {
        let message = format!(
            "is truncated or not safetensors: its header should have {header} bytes, but {} \
             follow; {again}",
            rest.len()
        );
        return Error::model(path, message);
    }
    let (json, data) = rest.split_at(header as usize);
    let promised = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(json)
        .ok()
        .and_then(|map| map.values().filter_map(|t| t.get("data_offsets")?.get(1)?.as_u64()).max());
    match promised {
        Some(end) if end > data.len() as u64 => {
            let message = format!(
                "is truncated: its header promises {end} bytes of values, but the file has {}; \
                 {again}",
                data.len()
            );
            Error::model(path, message)
        }
        _ => Error::model(
            path,
            format!("has a header that does not describe the file ({error}); {again}"),
        ),
    }
}

#[cfg(test)]
mod tests;
