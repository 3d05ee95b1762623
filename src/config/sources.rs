//! The files of a run's rows, some with a weight in a mixture. Layer 1.
//!
//! Invariant: a text that names an existing file is that file, whatever colons and commas it has.

use std::path::{Path, PathBuf};

use toml::Value as Toml;

use super::value::{Given, Value, words};

words! {
    /// When sampling from a mixture ends.
    #[derive(Default)]
    pub enum MixtureStop {
        #[default]
        FirstExhausted = "first_exhausted",
        AllExhausted = "all_exhausted",
    }
}

/// A file, folder or pattern, and its weight in a mixture.
#[derive(Clone, Debug, PartialEq)]
pub struct DataFile {
    pub path: PathBuf,
    pub weight: Option<f64>,
}

/// The files that a run reads its rows from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DataFiles(pub Vec<DataFile>);

impl DataFiles {
    /// Parses the files of a text such as `a.jsonl` or `a.jsonl:0.7,b.parquet:0.3`. Commas inside
    /// brackets belong to a pattern.
    pub fn parse(text: &str) -> Vec<DataFile> {
        if let Some(one) = existing(text) {
            return vec![one];
        }
        let (mut parts, mut depth) = (vec![String::new()], 0usize);
        for c in text.chars() {
            match c {
                '[' => depth += 1,
                ']' => depth = depth.saturating_sub(1),
                ',' if depth == 0 => {
                    parts.push(String::new());
                    continue;
                }
                _ => {}
            }
            if let Some(last) = parts.last_mut() {
                last.push(c);
            }
        }
        let parts = parts.iter().map(|p| p.trim()).filter(|p| !p.is_empty());
        parts.map(|p| existing(p).unwrap_or_else(|| one(p))).collect()
    }

    /// What is wrong with the weights.
    pub fn problem(&self) -> Option<String> {
        let weights: Vec<Option<f64>> = self.0.iter().map(|f| f.weight).collect();
        let bad = self.0.iter().find(|f| f.weight.is_some_and(|w| !(w > 0.0 && w.is_finite())));
        if let Some(file) = bad {
            return Some(format!(
                "data: the weight of {} must be above 0; leave the file out to train without it",
                file.path.display()
            ));
        }
        let without = self.0.iter().find(|f| f.weight.is_none())?;
        weights.iter().any(Option::is_some).then(|| {
            format!(
                "data: {} has no weight, but others have one; write {0}:WEIGHT, or no weights at \
                 all",
                without.path.display()
            )
        })
    }

    /// Whether rows are sampled by weights.
    pub fn is_mixture(&self) -> bool {
        self.0.iter().any(|f| f.weight.is_some())
    }
}

/// The text as an existing file, or as an existing file with a weight.
fn existing(text: &str) -> Option<DataFile> {
    if Path::new(text).exists() {
        return Some(DataFile { path: text.into(), weight: None });
    }
    let file = one(text);
    (file.weight.is_some() && file.path.exists()).then_some(file)
}

fn one(text: &str) -> DataFile {
    let weighted = text.rsplit_once(':').and_then(|(path, weight)| {
        Some((path, weight.trim().parse::<f64>().ok()?)).filter(|(path, _)| !path.is_empty())
    });
    match weighted {
        Some((path, weight)) => DataFile { path: path.into(), weight: Some(weight) },
        None => DataFile { path: text.into(), weight: None },
    }
}

impl std::fmt::Display for DataFile {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}", self.path.display())?;
        self.weight.map_or(Ok(()), |weight| write!(f, ":{weight}"))
    }
}

const EXPECTED: &str = "files, each with a weight or none: a.jsonl:0.7,b.parquet:0.3, a list of \
                        them, or a table of weights by file";

impl Value for DataFiles {
    fn kind() -> String {
        "list of files, with weights or none".into()
    }

    fn read(given: &Given) -> Result<Self, String> {
        let number = |v: &Toml| v.as_float().or_else(|| v.as_integer().map(|i| i as f64));
        let item = |v: &Toml| -> Option<Vec<DataFile>> {
            match v {
                Toml::String(text) => Some(DataFiles::parse(text)),
                Toml::Table(table) => {
                    let path = table.get("path")?.as_str()?;
                    let weight = match table.get("weight") {
                        Some(weight) => Some(number(weight)?),
                        None => None,
                    };
                    let known = table.keys().all(|k| k == "path" || k == "weight");
                    known.then(|| vec![DataFile { path: path.into(), weight }])
                }
                _ => None,
            }
        };
        let files = match given {
            Given::Text(text) | Given::File(Toml::String(text)) => Some(DataFiles::parse(text)),
            Given::File(Toml::Array(items)) => {
                items.iter().map(item).collect::<Option<Vec<_>>>().map(|all| all.concat())
            }
            Given::File(Toml::Table(table)) => table
                .iter()
                .map(|(path, w)| Some(DataFile { path: path.into(), weight: Some(number(w)?) }))
                .collect(),
            Given::File(_) => None,
        };
        files.map(DataFiles).ok_or_else(|| EXPECTED.into())
    }

    fn written(&self) -> Toml {
        let entry = |file: &DataFile| {
            let path = Toml::String(file.path.display().to_string());
            let weight = file.weight.map(|w| ("weight".to_string(), Toml::Float(w)));
            Toml::Table([("path".to_string(), path)].into_iter().chain(weight).collect())
        };
        Toml::Array(self.0.iter().map(entry).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Vec<(String, Option<f64>)> {
        let files = DataFiles::parse(text);
        files.into_iter().map(|f| (f.path.display().to_string(), f.weight)).collect()
    }

    #[test]
    fn a_weight_is_a_number_behind_the_last_colon() {
        let pair = |p: &str, w| (p.to_string(), w);
        assert_eq!(
            shown("a.jsonl:0.7, b.parquet:3"),
            [pair("a.jsonl", Some(0.7)), pair("b.parquet", Some(3.0))]
        );
        assert_eq!(shown(r"C:\rows\a.jsonl"), [pair(r"C:\rows\a.jsonl", None)]);
        assert_eq!(shown(r"C:\rows\a.jsonl:2"), [pair(r"C:\rows\a.jsonl", Some(2.0))]);
        assert_eq!(shown("part-[a,b]*.jsonl:1"), [pair("part-[a,b]*.jsonl", Some(1.0))]);
        assert_eq!(shown("a:b:c.jsonl"), [pair("a:b:c.jsonl", None)]);
    }

    #[test]
    fn a_file_that_is_there_keeps_its_colons_and_commas() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a,b:0.5");
        std::fs::write(&odd, "").unwrap();
        let text = odd.to_str().unwrap();
        assert_eq!(shown(text), [(text.to_string(), None)]);
        assert_eq!(shown(&format!("{text}:2")), [(text.to_string(), Some(2.0))]);
    }

    #[test]
    fn weights_are_given_to_all_files_or_to_none() {
        let problem = |text: &str| DataFiles(DataFiles::parse(text)).problem();
        assert_eq!(problem("a:1,b:2"), None);
        assert_eq!(problem("a,b"), None);
        assert!(problem("a:1,b").unwrap().contains("b has no weight"));
        assert!(problem("a:0,b:1").unwrap().contains("must be above 0"));
        assert!(problem("a:-1,b:1").unwrap().contains("must be above 0"));
        assert!(problem("a:inf,b:1").unwrap().contains("must be above 0"));
    }

    #[test]
    fn what_is_written_reads_back() {
        let files = DataFiles(DataFiles::parse("a.jsonl:0.7,b.parquet:0.3"));
        assert_eq!(DataFiles::read(&Given::File(files.written())), Ok(files));
        let plain = DataFiles(DataFiles::parse("a.jsonl,b.jsonl"));
        assert_eq!(DataFiles::read(&Given::File(plain.written())), Ok(plain));
    }
}
