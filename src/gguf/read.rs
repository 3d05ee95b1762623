//! A mapped GGUF file: header, metadata, tensors. Layer 6.
//!
//! Invariant: no allocation is sized by a number of the file before that many bytes are known to
//! follow. A tensor that [`GgufFile::tensor`] returns is completely within the file.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::blocks::GgufType;
use crate::error::{Error, Result};

const MAX_DIMS: u32 = 4;
const MAX_DEPTH: u32 = 4; // nesting of lists
const DEFAULT_ALIGNMENT: u64 = 32;

/// A metadata value; a list stays in the file until it is read.
#[derive(Clone, Debug, PartialEq)]
pub enum MetaValue {
    Unsigned(u64),
    Signed(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    Text(String),
    List { item: u32, count: usize, bytes: Range<usize> },
}

/// The type numbers of metadata values.
pub mod item {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const TEXT: u32 = 8;
    pub const LIST: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

/// A tensor: its name, type, shape in Hugging Face's order (rows first) and bytes in the file.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    pub name: String,
    pub dtype: GgufType,
    pub shape: Vec<usize>,
    bytes: Range<usize>,
}

impl GgufTensor {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: memmap2::Mmap,
    meta: BTreeMap<String, MetaValue>,
    tensors: Vec<GgufTensor>,
}

impl GgufFile {
    /// Maps `path` and checks its whole header. Errors name the byte position of the problem.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        if !file.metadata().map_err(|e| Error::io(path, e))?.is_file() {
            return Err(Error::model(path, "is not a file; give a .gguf file"));
        }
        // SAFETY: the map is read-only and private to this struct. If another process truncates the
        // file while it is mapped, SIGBUS ends this process; no undefined value is read.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let mut reader = Reader { path, bytes: &map, at: 0 };
        let (meta, tensors) = reader.header()?;
        Ok(Self { path: path.to_path_buf(), map, meta, tensors })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// The values of a tensor of this file as f32.
    pub fn values(&self, tensor: &GgufTensor) -> Result<Vec<f32>> {
        let Some(bytes) = self.map.get(tensor.bytes.clone()) else {
            return Err(Error::model(&self.path, format!("{} is not in this file", tensor.name)));
        };
        let mut out = vec![0f32; tensor.len()];
        tensor.dtype.widen(bytes, &mut out);
        Ok(out)
    }

    /// All keys of the metadata, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.meta.keys().map(String::as_str)
    }

    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.meta.get(key)
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::Text(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, other, "a text")),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    pub fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::Unsigned(n)) => Ok(Some(*n)),
            Some(MetaValue::Signed(n)) if *n >= 0 => Ok(Some(*n as u64)),
            Some(other) => Err(self.wrong(key, other, "an integer of at least 0")),
        }
    }

    /// A number. A 32-bit number becomes its shortest decimal.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::F32(x)) => Ok(x.to_string().parse().ok()),
            Some(MetaValue::F64(x)) => Ok(Some(*x)),
            Some(MetaValue::Unsigned(n)) => Ok(Some(*n as f64)),
            Some(other) => Err(self.wrong(key, other, "a number")),
        }
    }

    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let Some((count, bytes)) = self.list(key, item::TEXT, "a list of texts")? else {
            return Ok(None);
        };
        let mut reader =
            Reader { path: &self.path, bytes: &self.map[..bytes.end], at: bytes.start };
        (0..count).map(|_| reader.text()).collect::<Result<Vec<_>>>().map(Some)
    }

    pub fn ints(&self, key: &str) -> Result<Option<Vec<i32>>> {
        let four = |b: &[u8; 4]| i32::from_le_bytes(*b);
        Ok(self
            .list(key, item::I32, "a list of 32-bit integers")?
            .map(|(_, at)| self.map[at].as_chunks::<4>().0.iter().map(four).collect()))
    }

    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let four = |b: &[u8; 4]| f32::from_le_bytes(*b);
        Ok(self
            .list(key, item::F32, "a list of 32-bit floats")?
            .map(|(_, at)| self.map[at].as_chunks::<4>().0.iter().map(four).collect()))
    }

    fn list(&self, key: &str, of: u32, what: &str) -> Result<Option<(usize, Range<usize>)>> {
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::List { item, count, bytes }) if *item == of => {
                Ok(Some((*count, bytes.clone())))
            }
            Some(other) => Err(self.wrong(key, other, what)),
        }
    }

    fn wrong(&self, key: &str, value: &MetaValue, what: &str) -> Error {
        let found = match value {
            MetaValue::Unsigned(n) => n.to_string(),
            MetaValue::Signed(n) => n.to_string(),
            MetaValue::F32(x) => x.to_string(),
            MetaValue::F64(x) => x.to_string(),
            MetaValue::Bool(b) => b.to_string(),
            MetaValue::Text(text) => format!("{:?}", text.chars().take(40).collect::<String>()),
            MetaValue::List { item, count, .. } => {
                format!("a list of {count} items of type {item}")
            }
        };
        Error::model(&self.path, format!("{key} is {found}; it must be {what}"))
    }
}

struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

const AGAIN: &str = "download or write the file again";

impl<'a> Reader<'a> {
    fn bad<T>(&self, at: usize, what: impl std::fmt::Display) -> Result<T> {
        Err(Error::model(self.path, format!("at byte {at}: {what}; {AGAIN}")))
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8]> {
        let taken = usize::try_from(n).ok().filter(|n| *n <= self.left());
        let Some(n) = taken else {
            let left = self.left();
            return self
                .bad(self.at, format_args!("truncated: {what} needs {n} bytes, {left} are left"));
        };
        let found = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(found)
    }

    fn fixed<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.fixed(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.fixed(what).map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<&'a str> {
        let n = self.u64("the length of a text")?;
        let at = self.at;
        let bytes = self.take(n, "a text")?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(e) => self.bad(at + e.valid_up_to(), "a text is not UTF-8"),
        }
    }

    /// A number of items that have at least `least` bytes each.
    fn count(&mut self, least: usize, what: &str) -> Result<usize> {
        let at = self.at;
        let n = self.u64(what)?;
        let fits = usize::try_from(n).ok().filter(|n| *n <= self.left() / least);
        match fits {
            Some(n) => Ok(n),
            None => {
                let left = self.left();
                self.bad(at, format_args!("{what} is {n}, but only {left} bytes follow"))
            }
        }
    }

    fn header(&mut self) -> Result<(BTreeMap<String, MetaValue>, Vec<GgufTensor>)> {
        let magic = self.fixed::<4>("the magic number")?;
        if &magic != b"GGUF" {
            return Err(Error::model(
                self.path,
                format!("is not a GGUF file: it begins with {magic:?}, not with \"GGUF\""),
            ));
        }
        let version = self.u32("the version")?;
        if version.swap_bytes() <= 3 && version != 0 {
            return Err(Error::model(
                self.path,
                "is big-endian; only little-endian files are supported",
            ));
        }
        if !(2..=3).contains(&version) {
            return Err(Error::model(
                self.path,
                format!("is GGUF version {version}; versions 2 and 3 are supported"),
            ));
        }
        let tensors = self.count(24, "the number of tensors")?;
        let values = self.count(13, "the number of metadata values")?;
        let mut meta = BTreeMap::new();
        for _ in 0..values {
            let at = self.at;
            let key = self.text()?.to_string();
            let kind = self.u32("the type of a value")?;
            let value = self.value(kind)?;
            if meta.contains_key(&key) {
                return self.bad(at, format_args!("the key {key} appears twice"));
            }
            meta.insert(key, value);
        }
        let alignment = match meta.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(MetaValue::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
            Some(other) => {
                return self.bad(self.at, format_args!("general.alignment is {other:?}"));
            }
        };
        let tensors = self.tensors(tensors, alignment)?;
        Ok((meta, tensors))
    }

    fn value(&mut self, kind: u32) -> Result<MetaValue> {
        let at = self.at;
        Ok(match kind {
            item::U8 => MetaValue::Unsigned(self.fixed::<1>("a value")?[0].into()),
            item::I8 => MetaValue::Signed(i8::from_le_bytes(self.fixed("a value")?).into()),
            item::U16 => MetaValue::Unsigned(u16::from_le_bytes(self.fixed("a value")?).into()),
            item::I16 => MetaValue::Signed(i16::from_le_bytes(self.fixed("a value")?).into()),
            item::U32 => MetaValue::Unsigned(self.u32("a value")?.into()),
            item::I32 => MetaValue::Signed(i32::from_le_bytes(self.fixed("a value")?).into()),
            item::U64 => MetaValue::Unsigned(self.u64("a value")?),
            item::I64 => MetaValue::Signed(i64::from_le_bytes(self.fixed("a value")?)),
            item::F32 => MetaValue::F32(f32::from_le_bytes(self.fixed("a value")?)),
            item::F64 => MetaValue::F64(f64::from_le_bytes(self.fixed("a value")?)),
            item::BOOL => match self.fixed::<1>("a value")?[0] {
                0 => MetaValue::Bool(false),
                1 => MetaValue::Bool(true),
                n => return self.bad(at, format_args!("a boolean is {n}")),
            },
            item::TEXT => MetaValue::Text(self.text()?.to_string()),
            item::LIST => self.list(0)?,
            _ => return self.bad(at.saturating_sub(4), format_args!("unknown type {kind}")),
        })
    }

    /// Skips a list and returns its position.
    fn list(&mut self, depth: u32) -> Result<MetaValue> {
        let at = self.at;
        let item = self.u32("the type of a list")?;
        let size = match item {
            item::U8 | item::I8 | item::BOOL => 1,
            item::U16 | item::I16 => 2,
            item::U32 | item::I32 | item::F32 => 4,
            item::U64 | item::I64 | item::F64 | item::TEXT => 8,
            item::LIST if depth < MAX_DEPTH => 12,
            item::LIST => return self.bad(at, format_args!("lists are nested {depth} deep")),
            _ => return self.bad(at, format_args!("unknown type {item}")),
        };
        let count = self.count(size, "the number of items of a list")?;
        let from = self.at;
        match item {
            item::TEXT => {
                for _ in 0..count {
                    let n = self.u64("the length of a text")?;
                    self.take(n, "a text")?;
                }
            }
            item::LIST => {
                for _ in 0..count {
                    self.list(depth + 1)?;
                }
            }
            _ => drop(self.take((count * size) as u64, "a list")?),
        }
        Ok(MetaValue::List { item, count, bytes: from..self.at })
    }

    fn tensors(&mut self, count: usize, alignment: u64) -> Result<Vec<GgufTensor>> {
        let mut found: Vec<(GgufTensor, u64, usize)> = Vec::with_capacity(count);
        for _ in 0..count {
            let at = self.at;
            let name = self.text()?.to_string();
            let dims = self.u32("the number of dimensions")?;
            if dims == 0 || dims > MAX_DIMS {
                return self.bad(at, format_args!("{name} has {dims} dimensions"));
            }
            let mut shape = Vec::new();
            for _ in 0..dims {
                let dim = self.u64("a dimension")?;
                match usize::try_from(dim).ok().filter(|d| *d > 0) {
                    Some(dim) => shape.push(dim),
                    None => return self.bad(at, format_args!("{name} has a dimension {dim}")),
                }
            }
            let number = self.u32("the type of a tensor")?;
            let offset = self.u64("the offset of a tensor")?;
            let dtype = match GgufType::of(number) {
                Ok(dtype) => dtype,
                Err(shown) => {
                    let message = format!(
                        "at byte {at}: {name} has the unsupported type {shown}; supported: {}. \
                         Get the file in one of these types",
                        GgufType::names()
                    );
                    return Err(Error::model(self.path, message));
                }
            };
            let row = shape[0];
            if !row.is_multiple_of(dtype.block()) {
                let (block, of) = (dtype.block(), dtype.name());
                return self.bad(
                    at,
                    format_args!("{name} has rows of {row} values; {of} has blocks of {block}"),
                );
            }
            let values = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
            let Some(bytes) = values.and_then(|n| dtype.bytes(n)) else {
                return self.bad(at, format_args!("{name} has too many values: {shape:?}"));
            };
            if !offset.is_multiple_of(alignment) {
                return self.bad(
                    at,
                    format_args!("{name} has the offset {offset}, not a multiple of {alignment}"),
                );
            }
            shape.reverse();
            found.push((GgufTensor { name, dtype, shape, bytes: 0..bytes }, offset, at));
        }
        let data = (self.at as u64).next_multiple_of(alignment);
        for (tensor, offset, at) in &mut found {
            let from = data.checked_add(*offset).and_then(|n| usize::try_from(n).ok());
            let range = from.and_then(|from| Some(from..from.checked_add(tensor.bytes.end)?));
            let Some(range) = range.filter(|r| r.end <= self.bytes.len()) else {
                let (name, n, size) = (&tensor.name, tensor.bytes.end, self.bytes.len());
                return self.bad(
                    *at,
                    format_args!(
                        "truncated, or a wrong offset: {name} has {n} bytes from {data} + {offset} on, \
                         the file has {size}"
                    ),
                );
            };
            tensor.bytes = range;
        }
        let mut order: Vec<usize> = (0..found.len()).collect();
        order.sort_by_key(|i| found[*i].0.bytes.start);
        for pair in order.windows(2) {
            let ((a, _, _), (b, _, at)) = (&found[pair[0]], &found[pair[1]]);
            if a.bytes.end > b.bytes.start {
                return self.bad(*at, format_args!("{} overlaps the bytes of {}", b.name, a.name));
            }
        }
        order.sort_by_key(|i| found[*i].0.name.as_str());
        for pair in order.windows(2) {
            let ((a, _, _), (b, _, at)) = (&found[pair[0]], &found[pair[1]]);
            if a.name == b.name {
                return self.bad(*at, format_args!("the tensor {} appears twice", b.name));
            }
        }
        Ok(found.into_iter().map(|(tensor, _, _)| tensor).collect())
    }
}
