//! Tokenised rows in a file, so that the next start need not make them again. Layer 6.
//!
//! Invariant: a file is read only whole: its checksum covers every byte, its key everything that
//! its rows depend on. Ids stay in the file, which is mapped.
//!
//! The file: eight bytes of magic, the length of the description, the description (JSON), then for
//! each split its arrays, each from a multiple of eight bytes on; at the end XXH3 (128 bits) of all
//! before. Numbers are little-endian.

use std::path::Path;
use std::sync::Arc;

use bytemuck::Pod;
use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::store::{Places, TokenIds, TokenStore};
use crate::error::{Error, Result};
use crate::fsio::{self, AtomicFile};

/// Changes with the layout of the file.
const MAGIC: &[u8; 8] = b"temperc2";

/// What a run made of its rows.
#[derive(Clone, Debug, Default)]
pub struct TokenisedRun {
    /// What is said about the rows.
    pub summary: String,
    /// What is said about their files.
    pub notes: Vec<String>,
    /// Rows that were read, before any was dropped.
    pub read: [usize; 2],
    /// The training rows are conversations.
    pub conversations: bool,
    pub train: TokenStore,
    pub eval: TokenStore,
}

/// What stands in front of the arrays.
#[derive(Serialize, Deserialize)]
struct Description {
    key: String,
    summary: String,
    notes: Vec<String>,
    read: [usize; 2],
    conversations: bool,
    splits: [Counts; 2],
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Counts {
    tokens: usize,
    sequences: usize,
    rows: usize,
    labels: usize,
    places: usize,
}

impl Counts {
    fn of(store: &TokenStore) -> Counts {
        Counts {
            tokens: store.mask.len(),
            sequences: store.ends.len(),
            rows: store.rows.len(),
            labels: store.labels.len(),
            places: store.places.at.len(),
        }
    }
}

/// Writes a run's rows under `path`. `files`: those of the run, in order; places name them by
/// number, so that a file that was moved is named as it is called then.
pub fn write(path: &Path, key: &str, files: &[Arc<Path>], run: &TokenisedRun) -> Result<()> {
    let description = Description {
        key: key.into(),
        summary: run.summary.clone(),
        notes: run.notes.clone(),
        read: run.read,
        conversations: run.conversations,
        splits: [Counts::of(&run.train), Counts::of(&run.eval)],
    };
    let description =
        serde_json::to_vec(&description).map_err(|e| Error::Run(format!("row cache: {e}")))?;
    // A name of its own, for others may write the same file at the same time.
    let thread = format!("{:?}", std::thread::current().id());
    let number: String = thread.chars().filter(char::is_ascii_digit).collect();
    let own = fsio::with_suffix(path, &format!(".{}-{number}", std::process::id()));
    let mut to = Writer { file: AtomicFile::create(&own)?, hash: Xxh3::new(), at: 0 };
    to.bytes(MAGIC)?;
    to.bytes(&(description.len() as u64).to_le_bytes())?;
    to.array(&description)?;
    for store in [&run.train, &run.eval] {
        let numbers = file_numbers(&store.places, files)?;
        to.array(store.ids.all())?;
        to.array(bytemuck::cast_slice::<bool, u8>(&store.mask))?;
        to.array(&store.ends)?;
        to.array(&store.rows)?;
        to.array(&store.labels)?;
        to.array(&store.label_ends)?;
        let of = |(file, line): &(u32, u32)| [numbers[*file as usize], *line];
        to.array(&store.places.at.iter().map(of).collect::<Vec<[u32; 2]>>())?;
        to.array(&store.places.ends)?;
    }
    let sum = to.hash.digest128();
    to.bytes(&sum.to_le_bytes())?;
    to.file.commit()?;
    std::fs::rename(&own, path).map_err(|e| {
        let _ = std::fs::remove_file(&own);
        Error::io(path, e)
    })
}

/// The number of each of the places' files among those of the run.
fn file_numbers(places: &Places, files: &[Arc<Path>]) -> Result<Vec<u32>> {
    let number = |file: &Arc<Path>| files.iter().position(|f| f == file).map(|n| n as u32);
    let all: Option<Vec<u32>> = places.files.iter().map(number).collect();
    all.ok_or_else(|| Error::Run("row cache: a row comes from none of the run's files".into()))
}

struct Writer {
    file: AtomicFile,
    hash: Xxh3,
    at: usize,
}

impl Writer {
    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.at += bytes.len();
        self.file.write_all(bytes)
    }

    /// An array, and zeros to the next multiple of eight.
    fn array<T: Pod>(&mut self, values: &[T]) -> Result<()> {
        self.bytes(bytemuck::cast_slice(values))?;
        let rest = self.at.next_multiple_of(8) - self.at;
        self.bytes(&[0; 8][..rest])
    }
}

/// The rows that `path` holds under `key`. Error: why the file cannot be used.
pub fn read(
    path: &Path,
    key: &str,
    files: &[Arc<Path>],
) -> std::result::Result<TokenisedRun, String> {
    let map = fsio::map(path).map_err(|e| e.to_string())?;
    let body = map.len().checked_sub(16).ok_or("is too short")?;
    let sum = map[body..].try_into().map(u128::from_le_bytes).map_err(|_| "is too short")?;
    if xxh3_128(&map[..body]) != sum {
        return Err("its checksum is wrong".into());
    }
    let map = Arc::new(map);
    let mut from = Reader { map: &map, at: 0, end: body };
    if from.array::<u8>(8)? != MAGIC {
        return Err("is not a row cache of this version".into());
    }
    let length = from.array::<u64>(1)?[0];
    let description: Description = serde_json::from_slice(from.array::<u8>(length as usize)?)
        .map_err(|e| format!("its description is damaged: {e}"))?;
    if description.key != key {
        return Err("holds the rows of another run".into());
    }
    let [train, eval] = description.splits;
    Ok(TokenisedRun {
        summary: description.summary,
        notes: description.notes,
        read: description.read,
        conversations: description.conversations,
        train: from.store(train, files)?,
        eval: from.store(eval, files)?,
    })
}

struct Reader<'a> {
    map: &'a Arc<Mmap>,
    at: usize,
    end: usize,
}

impl<'a> Reader<'a> {
    fn array<T: Pod>(&mut self, count: usize) -> std::result::Result<&'a [T], String> {
        let short = || "its arrays are longer than it is".to_string();
        let bytes = count.checked_mul(size_of::<T>()).ok_or_else(short)?;
        let end = self.at.checked_add(bytes).filter(|end| *end <= self.end).ok_or_else(short)?;
        let part = &self.map[self.at..end];
        self.at = end.next_multiple_of(8).min(self.end);
        bytemuck::try_cast_slice(part).map_err(|e| e.to_string())
    }

    fn store(&mut self, n: Counts, files: &[Arc<Path>]) -> std::result::Result<TokenStore, String> {
        let at = self.at;
        self.array::<u32>(n.tokens)?;
        let ids = TokenIds::Mapped { map: self.map.clone(), at, count: n.tokens };
        let mask = bytemuck::checked::try_cast_slice::<u8, bool>(self.array(n.tokens)?);
        let mask = mask.map_err(|e| e.to_string())?.to_vec();
        let ends = self.ends(n.sequences, n.tokens)?;
        let rows = self.ends(n.rows, n.sequences)?;
        let labels = self.array::<u8>(n.labels)?.to_vec();
        let label_ends = self.ends(n.rows, n.labels)?;
        let at: Vec<(u32, u32)> =
            self.array::<[u32; 2]>(n.places)?.iter().map(|[file, line]| (*file, *line)).collect();
        if at.iter().any(|(file, _)| *file as usize >= files.len()) {
            return Err("its rows come from more files than the run has".into());
        }
        let places = Places { files: files.to_vec(), at, ends: self.ends(n.rows, n.places)? };
        Ok(TokenStore { ids, mask, ends, rows, labels, label_ends, places })
    }

    /// Ends of `count` lists that share `all` items.
    fn ends(&mut self, count: usize, all: usize) -> std::result::Result<Vec<u64>, String> {
        let ends = self.array::<u64>(count)?.to_vec();
        let last = ends.last().copied().unwrap_or(0) as usize;
        match ends.is_sorted() && last == all {
            true => Ok(ends),
            false => Err("its parts do not fit together".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored() -> (TokenisedRun, Vec<Arc<Path>>) {
        let files: Vec<Arc<Path>> = vec![Path::new("a").into(), Path::new("b").into()];
        let mut store = TokenStore::default();
        store.add_labelled([(&[1, 2, 3][..], &[false, true, true][..])], &[7]);
        store.places.push([(&files[1], 4), (&files[0], 2)]);
        store.add([(&[4][..], &[false][..]), (&[5, 6][..], &[true, false][..])]);
        store.places.push([(&files[0], 9)]);
        let run = TokenisedRun {
            summary: "said".into(),
            notes: vec!["note".into()],
            read: [5, 0],
            conversations: true,
            train: store,
            eval: TokenStore::default(),
        };
        (run, files)
    }

    #[test]
    fn what_is_written_is_read_and_a_moved_file_has_its_new_name() {
        let (run, files) = stored();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.rows");
        write(&path, "k", &files, &run).unwrap();
        let moved: Vec<Arc<Path>> = vec![Path::new("c").into(), Path::new("b").into()];
        let back = read(&path, "k", &moved).unwrap();
        assert_eq!((back.summary, back.notes, back.read), (run.summary, run.notes, run.read));
        assert!(back.conversations);
        assert_eq!(back.train.count(), 2);
        for row in 0..2 {
            assert!(back.train.sequences(row).eq(run.train.sequences(row)));
            assert_eq!(back.train.labels(row), run.train.labels(row));
        }
        assert_eq!(back.train.places.text(0), "b:4 + c:2");
        assert_eq!(back.train.row_lengths(), [3, 3]);
        assert_eq!((back.eval.count(), back.eval.longest()), (0, None));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn every_damaged_byte_and_every_cut_is_found() {
        let (run, files) = stored();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.rows");
        write(&path, "k", &files, &run).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert!(read(&path, "k", &files).is_err(), "byte {at}");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert!(read(&path, "k", &files).is_err(), "cut at {at}");
        }
        std::fs::write(&path, &whole).unwrap();
        assert!(read(&path, "other", &files).unwrap_err().contains("another run"));
        assert!(read(&path, "k", &files[..1]).unwrap_err().contains("more files"));
    }
}
