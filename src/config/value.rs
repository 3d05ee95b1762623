//! The value types of options, in TOML and on the command line. Layer 1.
//!
//! Invariant: `read(written(v)) == v` for every value, so the resolved file loads back unchanged.

use toml::Value as Toml;

/// A given value: typed in a run file, text on the command line.
#[derive(Clone, Debug)]
pub enum Given {
    File(Toml),
    Text(String),
}

impl Given {
    /// The value for messages, as the user wrote it.
    pub fn shown(&self) -> String {
        match self {
            Given::File(value) => value.to_string(),
            Given::Text(text) => text.clone(),
        }
    }

    /// Whether it is `none` (also Python's `None`, and `null`), which turns an optional option off.
    pub fn is_none(&self) -> bool {
        let text = match self {
            Given::File(Toml::String(text)) | Given::Text(text) => text,
            Given::File(_) => return false,
        };
        matches!(text.as_str(), "none" | "None" | "null")
    }

    fn word(&self) -> Option<String> {
        match self {
            Given::File(Toml::String(text)) => Some(text.clone()),
            Given::File(Toml::Boolean(b)) => Some(b.to_string()),
            Given::File(_) => None,
            Given::Text(text) if text == "True" => Some("true".into()),
            Given::Text(text) if text == "False" => Some("false".into()),
            Given::Text(text) => Some(text.clone()),
        }
    }

    fn integer(&self) -> Option<i64> {
        match self {
            Given::File(Toml::Integer(i)) => Some(*i),
            Given::Text(text) => text.replace('_', "").parse().ok(),
            Given::File(_) => None,
        }
    }

    fn number(&self) -> Option<f64> {
        match self {
            Given::File(Toml::Float(f)) => Some(*f),
            Given::File(Toml::Integer(i)) => Some(*i as f64),
            Given::Text(text) => text.replace('_', "").parse().ok(),
            Given::File(_) => None,
        }
    }
}

/// The type of an option. An error of `read` says what was expected.
pub trait Value: Sized {
    /// The type's name in messages and in the list of options.
    fn kind() -> String;
    fn read(given: &Given) -> Result<Self, String>;
    fn written(&self) -> Toml;
}

impl Value for f64 {
    fn kind() -> String {
        "number".into()
    }
    fn read(given: &Given) -> Result<Self, String> {
        given.number().filter(|f| f.is_finite()).ok_or_else(|| "a number".into())
    }
    fn written(&self) -> Toml {
        Toml::Float(*self)
    }
}

impl Value for i64 {
    fn kind() -> String {
        "integer".into()
    }
    fn read(given: &Given) -> Result<Self, String> {
        given.integer().ok_or_else(|| "a whole number".into())
    }
    fn written(&self) -> Toml {
        Toml::Integer(*self)
    }
}

impl Value for u64 {
    fn kind() -> String {
        "integer".into()
    }
    fn read(given: &Given) -> Result<Self, String> {
        given
            .integer()
            .and_then(|i| u64::try_from(i).ok())
            .ok_or_else(|| "a whole number, not negative".into())
    }
    fn written(&self) -> Toml {
        Toml::Integer(i64::try_from(*self).unwrap_or(i64::MAX)) // `read` accepts at most i64::MAX
    }
}

impl Value for usize {
    fn kind() -> String {
        "integer".into()
    }
    fn read(given: &Given) -> Result<Self, String> {
        given
            .integer()
            .and_then(|i| usize::try_from(i).ok())
            .ok_or_else(|| "a whole number, not negative".into())
    }
    fn written(&self) -> Toml {
        Toml::Integer(i64::try_from(*self).unwrap_or(i64::MAX))
    }
}

impl Value for bool {
    fn kind() -> String {
        "true or false".into()
    }
    fn read(given: &Given) -> Result<Self, String> {
        match (given, given.word().as_deref()) {
            (Given::File(Toml::Boolean(b)), _) => Ok(*b),
            (Given::Text(_), Some("true")) => Ok(true),
            (Given::Text(_), Some("false")) => Ok(false),
            _ => Err("true or false".into()),
        }
    }
    fn written(&self) -> Toml {
        Toml::Boolean(*self)
    }
}

impl Value for String {
    fn kind() -> String {
        "text".into()
    }
    fn read(given: &Given) -> Result<Self, String> {
        match given {
            Given::File(Toml::String(text)) | Given::Text(text) => Ok(text.clone()),
            Given::File(_) => Err("text in quotes".into()),
        }
    }
    fn written(&self) -> Toml {
        Toml::String(self.clone())
    }
}

impl<T: Value> Value for Option<T> {
    fn kind() -> String {
        format!("{} or none", T::kind())
    }
    fn read(given: &Given) -> Result<Self, String> {
        if given.is_none() {
            return Ok(None);
        }
        T::read(given).map(Some).map_err(|expected| format!("{expected}, or \"none\""))
    }
    fn written(&self) -> Toml {
        self.as_ref().map_or_else(|| Toml::String("none".into()), Value::written)
    }
}

/// On the command line a list is `a,b` or, as in a run file, `[1, 2]`; a single value is a list of
/// one in both places.
impl<T: Value> Value for Vec<T> {
    fn kind() -> String {
        format!("list of {}", T::kind())
    }
    fn read(given: &Given) -> Result<Self, String> {
        let items: Vec<Given> = match given {
            Given::File(Toml::Array(items)) => items.iter().cloned().map(Given::File).collect(),
            Given::File(_) => vec![given.clone()],
            Given::Text(text) if text.trim().is_empty() => Vec::new(),
            Given::Text(text) => {
                if let Some(list) = in_brackets(text) {
                    return Self::read(&Given::File(list));
                }
                text.split(',').map(|item| Given::Text(item.trim().to_string())).collect()
            }
        };
        items
            .iter()
            .map(|item| T::read(item).map_err(|expected| format!("a list, each item {expected}")))
            .collect()
    }
    fn written(&self) -> Toml {
        Toml::Array(self.iter().map(Value::written).collect())
    }
}

/// A list in a run file's syntax. A pattern such as `[qv]` is not one.
fn in_brackets(text: &str) -> Option<Toml> {
    let text = text.trim();
    if !(text.starts_with('[') && text.ends_with(']')) {
        return None;
    }
    toml::from_str::<toml::Table>(&format!("list = {text}")).ok()?.remove("list")
}

/// HF's "whole number, or below 1 a share of the whole": steps of a run, rows of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    Count(u64),
    Share(f64), // 0 < share < 1
}

impl Amount {
    /// The amount out of `total`; a share is rounded up, as in transformers.
    pub fn of(self, total: u64) -> u64 {
        match self {
            Amount::Count(count) => count,
            Amount::Share(share) => (share * total as f64).ceil() as u64,
        }
    }

    pub fn is_zero(self) -> bool {
        self == Amount::Count(0)
    }
}

impl Value for Amount {
    fn kind() -> String {
        "integer, or a share below 1".into()
    }
    fn read(given: &Given) -> Result<Self, String> {
        match given.number() {
            Some(f) if f >= 0.0 && f.fract() == 0.0 && f < 9e15 => Ok(Amount::Count(f as u64)),
            Some(f) if f > 0.0 && f < 1.0 => Ok(Amount::Share(f)),
            _ => Err("a whole number, or a share between 0 and 1".into()),
        }
    }
    fn written(&self) -> Toml {
        match self {
            Amount::Count(count) => Toml::Integer(i64::try_from(*count).unwrap_or(i64::MAX)),
            Amount::Share(share) => Toml::Float(*share),
        }
    }
}

/// Declares an enum whose variants are words of the run file. The first word is the one that is
/// written, the others are aliases. `=> NUMBER` is the variant's number in a kernel.
macro_rules! words {
    ($(#[$meta:meta])* pub enum $name:ident {
        $($(#[$vmeta:meta])* $variant:ident = $word:literal $(| $alias:literal)* $(=> $number:path)?,)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(i32)]
        pub enum $name {
            $(
                #[doc = concat!("`", $word, "`")]
                ///
                $(#[$vmeta])*
                $variant $(= $number)?,
            )+
        }

        impl $crate::config::value::Value for $name {
            fn kind() -> String {
                [$($word),+].join(" | ")
            }
            fn read(given: &$crate::config::value::Given) -> Result<Self, String> {
                $crate::config::value::choose(given, &[$((&[$word $(, $alias)*], Self::$variant)),+])
            }
            fn written(&self) -> toml::Value {
                $crate::config::value::word(match self { $(Self::$variant => $word),+ })
            }
        }
    };
}
pub(crate) use words;

/// The choice that has the given word.
pub(crate) fn choose<T: Copy>(given: &Given, choices: &[(&[&str], T)]) -> Result<T, String> {
    let word = given.word().unwrap_or_default();
    let found = choices.iter().find(|(words, _)| words.contains(&word.as_str()));
    found.map(|(_, choice)| *choice).ok_or_else(|| {
        let words: Vec<&str> =
            choices.iter().filter_map(|(words, _)| words.first().copied()).collect();
        let hint = crate::error::nearest(&word, words.iter().copied())
            .map(|w| format!("; did you mean {w}?"));
        format!("one of {}{}", words.join(", "), hint.unwrap_or_default())
    })
}

/// `true` and `false` are written as booleans, other words as text.
pub(crate) fn word(word: &str) -> Toml {
    word.parse().map_or_else(|_| Toml::String(word.into()), Toml::Boolean)
}
