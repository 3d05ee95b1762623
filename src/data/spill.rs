//! Keeps rows that must all be read before the first can be used: those of a mixture, or a set
//! whose last rows become evaluation rows. Layer 6.
//!
//! Invariant: a row is returned unchanged. Rows in a file take 16 bytes of memory each; if there is
//! no file, or it cannot be written, rows are in memory.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::row::Row;
use crate::error::{Error, Result};

/// Rows kept for later, in order.
pub enum KeptRows {
    /// None: the row was taken.
    Memory(Vec<Option<Row>>),
    File(RowFile),
}

/// Rows in an unnamed file, which is deleted when closed.
pub struct RowFile {
    to: BufWriter<File>,
    /// End of each row, in bytes.
    ends: Vec<u64>,
    /// File and line of each row.
    places: Vec<(u32, u32)>,
    files: Vec<Arc<Path>>,
}

impl KeptRows {
    /// Keeps rows in a file in the folder `dir`; None: in memory.
    pub fn new(dir: Option<&Path>) -> KeptRows {
        match dir.map(RowFile::create) {
            Some(Ok(file)) => KeptRows::File(file),
            // Without a file the rows only take more memory.
            Some(Err(_)) | None => KeptRows::Memory(Vec::new()),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            KeptRows::Memory(rows) => rows.len(),
            KeptRows::File(file) => file.ends.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds rows. Error: the disk is full, and the rows in the file cannot be read back.
    pub fn extend(&mut self, rows: Vec<Row>) -> Result<()> {
        let file = match self {
            KeptRows::Memory(all) => {
                all.extend(rows.into_iter().map(Some));
                return Ok(());
            }
            KeptRows::File(file) => file,
        };
        let before = file.ends.len();
        if rows.iter().try_for_each(|row| file.push(row)).and_then(|()| file.to.flush()).is_ok() {
            return Ok(());
        }
        let back = (0..before).map(|row| file.row(row).map(Some)).collect::<Result<Vec<_>>>()?;
        *self = KeptRows::Memory(back);
        self.extend(rows)
    }

    /// Returns a row; `last`: the row is not requested again.
    pub fn take(&mut self, row: usize, last: bool) -> Result<Row> {
        match self {
            KeptRows::File(file) => file.row(row),
            KeptRows::Memory(rows) => {
                let slot = rows.get_mut(row);
                let row = slot.and_then(|slot| if last { slot.take() } else { slot.clone() });
                row.ok_or_else(|| Error::Run("a row is used a second time".into()))
            }
        }
    }
}

impl RowFile {
    fn create(dir: &Path) -> Result<RowFile> {
        let thread = format!("{:?}", std::thread::current().id());
        let number: String = thread.chars().filter(char::is_ascii_digit).collect();
        let path = dir.join(format!("rows.{}-{number}.tmp", std::process::id()));
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(|e| Error::io(&path, e))?;
        std::fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
        let to = BufWriter::with_capacity(1 << 20, file);
        Ok(RowFile { to, ends: Vec::new(), places: Vec::new(), files: Vec::new() })
    }

    fn push(&mut self, row: &Row) -> std::io::Result<()> {
        let bytes = serde_json::to_vec(&row.value)?;
        self.to.write_all(&bytes)?;
        self.ends.push(self.end(self.ends.len()) + bytes.len() as u64);
        if self.files.last() != Some(&row.file) {
            self.files.push(row.file.clone());
        }
        let line = u32::try_from(row.line).unwrap_or(u32::MAX);
        self.places.push((self.files.len() as u32 - 1, line));
        Ok(())
    }

    /// Total bytes of the rows before `row`.
    fn end(&self, row: usize) -> u64 {
        if row == 0 { 0 } else { self.ends[row - 1] }
    }

    fn row(&self, row: usize) -> Result<Row> {
        let mut bytes = vec![0; (self.ends[row] - self.end(row)) as usize];
        let read = self.to.get_ref().read_exact_at(&mut bytes, self.end(row));
        let value = read
            .map_err(serde_json::Error::io)
            .and_then(|()| serde_json::from_slice::<Value>(&bytes));
        let (file, line) = self.places[row];
        match value {
            Ok(Value::Object(value)) => {
                Ok(Row { value, file: self.files[file as usize].clone(), line: line as usize })
            }
            Ok(_) => Err(Error::Run("a row in the temporary file is not an object".into())),
            Err(e) => Err(Error::Run(format!("rows in the temporary file cannot be read: {e}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_from_a_file_as_they_were_put_in() {
        let dir = tempfile::tempdir().unwrap();
        let texts = [
            r#"{"z":1,"a":[1.5,-0.0,1e300,0.1,18446744073709551615,-9223372036854775808]}"#,
            r#"{"text":"\u0000\ud83d\ude00 \\ \" é","b":{"y":null,"x":[]}}"#,
        ];
        let row = |i: usize| {
            let Value::Object(value) = serde_json::from_str(texts[i % 2]).unwrap() else {
                panic!()
            };
            let file = Path::new(["a", "b"][i / 2]).into();
            Row { value, file, line: 7 + i }
        };
        let all: Vec<Row> = (0..4).map(row).collect();
        let (mut file, mut memory) = (KeptRows::new(Some(dir.path())), KeptRows::new(None));
        assert!(matches!(file, KeptRows::File(_)));
        for kept in [&mut file, &mut memory] {
            kept.extend(all[..3].to_vec()).unwrap();
            kept.extend(all[3..].to_vec()).unwrap();
            assert_eq!(kept.len(), 4);
            for i in [2, 0, 3, 1] {
                let back = kept.take(i, i == 1).unwrap();
                let same = |row: &Row| (format!("{:?}", row.value), row.place());
                assert_eq!(same(&back), same(&all[i]));
            }
        }
        assert!(memory.take(1, false).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
