//! A file of tokenised rows, so that the next start can skip tokenisation. Layer 6.
//!
//! Invariant: a file is used as a whole or not at all: its checksum covers every byte, and its key
//! covers everything that its rows depend on. Tokens stay in the file.
//!
//! Layout of the file: eight magic bytes; the tokens of each split, written as they are produced;
//! the index of each split, as arrays aligned to eight bytes; the description (JSON) and its
//! length; finally the XXH3 hash (128 bits) of everything before it. Numbers are little-endian.

use std::path::Path;
use std::sync::Arc;

use bytemuck::Pod;
use serde::{Deserialize, Serialize};

use super::store::{Places, StoredTokens, TOKEN_BYTES, TokenStore, Tokens};
use super::token_file::TokenFile;
use crate::error::{Error, Result};

/// Changes whenever the layout of the file changes.
const MAGIC: &[u8; 8] = b"temperc3";

/// The tokenised rows of a run.
#[derive(Clone, Debug, Default)]
pub struct TokenisedRun {
    /// Summary of the rows, for the user.
    pub summary: String,
    /// Notes on their files, for the user.
    pub notes: Vec<String>,
    /// Rows read from each split, before any was dropped.
    pub read: [usize; 2],
    /// Whether the training rows are conversations.
    pub conversations: bool,
    pub train: TokenStore,
    pub eval: TokenStore,
}

/// The description stored at the end of the file.
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
    /// Byte offset of the tokens.
    start: u64,
    tokens: usize,
    /// Byte offset of the index.
    index: u64,
    sequences: usize,
    rows: usize,
    labels: usize,
    places: usize,
}

/// Creates the file that [`finish`] renames to `path`; stores from [`TokenStore::in_file`] write to
/// it.
pub fn begin(path: &Path) -> Result<Arc<TokenFile>> {
    let file = TokenFile::create(path)?;
    file.append(MAGIC)?;
    Ok(Arc::new(file))
}

/// Finishes the file that holds the tokens of `run`. `files`: the run's data files, in order.
/// Places refer to them by number, so that a moved file is later reported under its new path.
pub fn finish(
    to: &TokenFile,
    path: &Path,
    key: &str,
    files: &[Arc<Path>],
    run: &TokenisedRun,
) -> Result<()> {
    let description = Description {
        key: key.into(),
        summary: run.summary.clone(),
        notes: run.notes.clone(),
        read: run.read,
        conversations: run.conversations,
        splits: [index(to, &run.train, files)?, index(to, &run.eval, files)?],
    };
    let description =
        serde_json::to_vec(&description).map_err(|e| Error::Run(format!("row cache: {e}")))?;
    to.append(&description)?;
    to.append(&(description.len() as u64).to_le_bytes())?;
    to.finish(path)
}

/// Appends the index of a split.
fn index(to: &TokenFile, store: &TokenStore, files: &[Arc<Path>]) -> Result<Counts> {
    let start = match &store.tokens {
        Tokens::File(tokens) => tokens.start,
        Tokens::Memory { ids, .. } if ids.is_empty() => 0,
        Tokens::Memory { .. } => return Err(Error::Run("its tokens could not be written".into())),
    };
    let numbers = file_numbers(&store.places, files)?;
    let of = |(file, line): &(u32, u32)| [numbers[*file as usize], *line];
    let places: Vec<[u32; 2]> = store.places.at.iter().map(of).collect();
    let index = array(to, &store.ends)?;
    array(to, &store.rows)?;
    array(to, &store.labels)?;
    array(to, &store.label_ends)?;
    array(to, &places)?;
    array(to, &store.places.ends)?;
    Ok(Counts {
        start,
        tokens: store.ends.last().map_or(0, |end| *end as usize),
        index,
        sequences: store.ends.len(),
        rows: store.rows.len(),
        labels: store.labels.len(),
        places: places.len(),
    })
}

/// Returns, for each file of `places`, its index among the files of the run.
fn file_numbers(places: &Places, files: &[Arc<Path>]) -> Result<Vec<u32>> {
    let number = |file: &Arc<Path>| files.iter().position(|f| f == file).map(|n| n as u32);
    let all: Option<Vec<u32>> = places.files.iter().map(number).collect();
    all.ok_or_else(|| {
        Error::Run("row cache: a row is from a file that the run does not have".into())
    })
}

/// Appends zeros up to a multiple of eight, then an array; returns the array's byte offset.
fn array<T: Pod>(to: &TokenFile, values: &[T]) -> Result<u64> {
    let rest = to.end().next_multiple_of(8) - to.end();
    to.append(&[0; 8][..rest as usize])?;
    to.append(bytemuck::cast_slice(values))
}

/// Reads the rows that `path` holds under `key`. Error: why the file cannot be used.
pub fn read(
    path: &Path,
    key: &str,
    files: &[Arc<Path>],
) -> std::result::Result<TokenisedRun, String> {
    let said = |e: Error| e.to_string();
    let file = Arc::new(TokenFile::open(path).map_err(said)?);
    if !file.is_whole().map_err(said)? {
        return Err("its checksum is wrong".into());
    }
    let size = file.size().map_err(said)?;
    let mut from = Reader { file: &file, at: 0, end: size - 16 };
    if from.array::<u8>(8)? != MAGIC {
        return Err("is not a row cache of this version".into());
    }
    let short = "is too short";
    from.at = from.end.checked_sub(8).ok_or(short)?;
    let length = [from.at, from.array::<u64>(1)?[0]];
    from.at = length[0].checked_sub(length[1]).ok_or(short)?;
    let description: Description = serde_json::from_slice(&from.array::<u8>(length[1] as usize)?)
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
    file: &'a Arc<TokenFile>,
    at: u64,
    end: u64,
}

impl Reader<'_> {
    /// Returns the end of `count` items of `size` bytes that start at `at`; None if it lies past
    /// the end of the file.
    fn bytes(&self, at: u64, count: usize, size: u64) -> Option<u64> {
        let bytes = (count as u64).checked_mul(size)?;
        at.checked_add(bytes).filter(|end| *end <= self.end)
    }

    fn array<T: Pod>(&mut self, count: usize) -> std::result::Result<Vec<T>, String> {
        let end = self.bytes(self.at, count, size_of::<T>() as u64);
        let end = end.ok_or("its arrays extend beyond the end of the file")?;
        let mut values = vec![T::zeroed(); count];
        self.file.read(self.at, &mut values).map_err(|e| e.to_string())?;
        self.at = end.next_multiple_of(8);
        Ok(values)
    }

    fn store(&mut self, n: Counts, files: &[Arc<Path>]) -> std::result::Result<TokenStore, String> {
        self.bytes(n.start, n.tokens, TOKEN_BYTES)
            .ok_or("its tokens extend beyond the end of the file")?;
        let tokens = StoredTokens::finished(self.file.clone(), n.start, n.tokens as u64);
        self.at = n.index;
        let ends = self.ends(n.sequences, n.tokens)?;
        let rows = self.ends(n.rows, n.sequences)?;
        let labels = self.array::<u8>(n.labels)?;
        let label_ends = self.ends(n.rows, n.labels)?;
        let at: Vec<(u32, u32)> =
            self.array::<[u32; 2]>(n.places)?.iter().map(|[file, line]| (*file, *line)).collect();
        if at.iter().any(|(file, _)| *file as usize >= files.len()) {
            return Err("its rows come from more files than the run has".into());
        }
        let places = Places { files: files.to_vec(), at, ends: self.ends(n.rows, n.places)? };
        Ok(TokenStore { tokens: Tokens::File(tokens), ends, rows, labels, label_ends, places })
    }

    /// Reads the ends of `count` lists that together have `all` items.
    fn ends(&mut self, count: usize, all: usize) -> std::result::Result<Vec<u64>, String> {
        let ends = self.array::<u64>(count)?;
        let last = ends.last().copied().unwrap_or(0) as usize;
        match ends.is_sorted() && last == all {
            true => Ok(ends),
            false => Err("its parts are inconsistent".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(mut store: TokenStore, files: &[Arc<Path>]) -> TokenStore {
        let first = (&[1, 2, 3][..], &[false, true, true][..]);
        store.add_labelled([first], &[7]).unwrap();
        store.places.push([(&files[1], 4), (&files[0], 2)]);
        store.add([(&[4][..], &[false][..]), (&[5, 6][..], &[true, false][..])]).unwrap();
        store.places.push([(&files[0], 9)]);
        store
    }

    /// Writes the file; returns the rows as they are in memory.
    fn stored(path: &Path) -> (TokenisedRun, Vec<Arc<Path>>) {
        let files: Vec<Arc<Path>> = vec![Path::new("a").into(), Path::new("b").into()];
        let file = begin(path).unwrap();
        let mut train = rows(TokenStore::in_file(file.clone()), &files);
        train.write().unwrap();
        let run = TokenisedRun {
            summary: "said".into(),
            notes: vec!["note".into()],
            read: [5, 0],
            conversations: true,
            train,
            eval: TokenStore::in_file(file.clone()),
        };
        finish(&file, path, "k", &files, &run).unwrap();
        let train = rows(TokenStore::default(), &files);
        (TokenisedRun { train, ..run }, files)
    }

    #[test]
    fn what_is_written_is_read_and_a_moved_file_has_its_new_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.rows");
        let (run, _) = stored(&path);
        let moved: Vec<Arc<Path>> = vec![Path::new("c").into(), Path::new("b").into()];
        let back = read(&path, "k", &moved).unwrap();
        assert_eq!((back.summary, back.notes, back.read), (run.summary, run.notes, run.read));
        assert!(back.conversations);
        assert_eq!(back.train.count(), 2);
        for row in 0..2 {
            assert_eq!(back.train.row(row).unwrap(), run.train.row(row).unwrap());
            assert_eq!(back.train.labels(row), run.train.labels(row));
        }
        assert_eq!(back.train.places.text(0), "b:4 + c:2");
        assert_eq!(back.train.row_lengths(), [3, 3]);
        assert_eq!((back.eval.count(), back.eval.longest()), (0, None));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn every_damaged_byte_and_every_cut_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.rows");
        let (_, files) = stored(&path);
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

    #[test]
    fn rows_that_cannot_be_written_are_read_back_and_kept_in_memory() {
        let files: Vec<Arc<Path>> = vec![Path::new("a").into(), Path::new("b").into()];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.rows");
        let file = begin(&path).unwrap();
        let mut train = rows(TokenStore::in_file(file.clone()), &files);
        train.write().unwrap();
        // A finished file accepts no more tokens, like a full disk.
        file.finish(&path).unwrap();
        let mut train = rows(train, &files);
        train.write().unwrap();
        let memory = rows(rows(TokenStore::default(), &files), &files);
        assert_eq!(train.count(), 4);
        for row in 0..4 {
            assert_eq!(train.row(row).unwrap(), memory.row(row).unwrap(), "{row}");
        }
        let run = TokenisedRun { train, ..TokenisedRun::default() };
        assert!(finish(&file, &path, "k", &files, &run).is_err());
    }
}
