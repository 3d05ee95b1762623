//! How rows are read from files: the same options for every command that reads rows. Layer 1.
//!
//! Invariant: they decide what happens to a row before any method sees it.

use toml::Value as Toml;

use super::value::{Given, Value, words};
use super::{Report, section};

words! {
    /// What to do with an unusable row.
    #[derive(Default)]
    pub enum OnBadRow {
        #[default]
        Error = "error",
        Drop = "drop",
    }
}

/// Fields of rows, with the columns of a file that they are read from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColumnMap(pub Vec<(String, String)>);

impl Value for ColumnMap {
    fn kind() -> String {
        "list of FIELD:COLUMN".into()
    }

    fn read(given: &Given) -> Result<Self, String> {
        let expected =
            || "FIELD:COLUMN pairs, such as prompt:question,completion:answer".to_string();
        if let Given::File(Toml::Table(table)) = given {
            let pair = |(field, column): (&String, &Toml)| {
                Some((field.clone(), column.as_str()?.to_string()))
            };
            return table
                .iter()
                .map(pair)
                .collect::<Option<_>>()
                .map(ColumnMap)
                .ok_or_else(expected);
        }
        let texts = Vec::<String>::read(given).map_err(|_| expected())?;
        let pairs = texts.iter().flat_map(|text| text.split(',')).map(str::trim);
        let pair = |text: &str| {
            let (field, column) = text.split_once(':')?;
            let (field, column) = (field.trim(), column.trim());
            (!field.is_empty() && !column.is_empty())
                .then(|| (field.to_string(), column.to_string()))
        };
        pairs
            .filter(|text| !text.is_empty())
            .map(pair)
            .collect::<Option<_>>()
            .map(ColumnMap)
            .ok_or_else(expected)
    }

    fn written(&self) -> Toml {
        let text = |(field, column): &(String, String)| Toml::String(format!("{field}:{column}"));
        Toml::Array(self.0.iter().map(text).collect())
    }
}

section! {
    /// How rows are read.
    pub struct DataOptions = "data" {
        /// Ours. Which column to read as which field, FIELD:COLUMN. With
        /// `prompt:question,completion:answer` the column question is the prompt.
        pub columns: ColumnMap = ColumnMap::default(),
        /// Ours. What to do with a row that cannot be parsed, is empty or is refused by the chat
        /// template. error: end the run. drop: leave it out, count it and name the first three.
        pub on_bad_row: OnBadRow = OnBadRow::Error,
        /// Ours. Largest row in bytes. A larger one is a bad row.
        pub max_row_bytes: usize = 16 << 20,
    }
}

impl DataOptions {
    fn rules(&self, report: &mut Report) {
        report.at_least("max_row_bytes", self.max_row_bytes, 1);
        let pairs = &self.columns.0;
        for (i, (field, column)) in pairs.iter().enumerate() {
            if pairs[..i].iter().any(|(f, _)| f == field) {
                report.problem(format!("columns: {field} is given two columns; give it one"));
            }
            if pairs[..i].iter().any(|(_, c)| c == column) {
                report.problem(format!("columns: {column} is given to two fields; give it to one"));
            }
        }
    }
}
