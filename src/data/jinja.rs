//! Features of Python and Jinja2 that minijinja lacks: `str()`, `json.dumps`, `strftime`, and a few
//! tests. Layer 6.
//!
//! Invariant: a value prints as in Python, because the printed text becomes the prompt that the
//! model was trained on.

use std::fmt::Write;
use std::sync::Arc;

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};

/// A date and time of day, without a time zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    pub year: i64,
    pub month: u32,  // 1..=12
    pub day: u32,    // 1..=31
    pub hour: u32,   // 0..=23
    pub minute: u32, // 0..=59
    pub second: u32, // 0..=59
}

impl Clock {
    /// Converts seconds since 1970-01-01 to a date and time in UTC.
    pub fn from_unix(seconds: i64) -> Clock {
        let (days, second) = (seconds.div_euclid(86400), seconds.rem_euclid(86400) as u32);
        // days since 0000-03-01, in eras of 400 years
        let z = days + 719468;
        let (era, doe) = (z.div_euclid(146097), z.rem_euclid(146097));
        let yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let month = if mp < 10 { mp + 3 } else { mp - 9 } as u32;
        Clock {
            year: yoe + era * 400 + i64::from(month <= 2),
            month,
            day: (doy - (153 * mp + 2) / 5 + 1) as u32,
            hour: second / 3600,
            minute: second / 60 % 60,
            second: second % 60,
        }
    }

    /// Parses a time written as `2025-03-09 14:05:07`.
    pub fn parse(text: &str) -> Option<Clock> {
        let numbers: Vec<u32> = text.split(['-', ' ', ':']).map_while(|n| n.parse().ok()).collect();
        let &[year, month, day, hour, minute, second] = numbers.as_slice() else { return None };
        let holds = (1..=12).contains(&month) && (1..=31).contains(&day);
        (holds && hour < 24 && minute < 60 && second < 60).then_some(Clock {
            year: i64::from(year),
            month,
            day,
            hour,
            minute,
            second,
        })
    }

    pub fn now() -> Clock {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Clock::from_unix(since.map_or(0, |d| d.as_secs() as i64))
    }

    /// Python's `strftime` for the codes that templates use; an unknown code is left unchanged.
    pub fn strftime(&self, format: &str) -> String {
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut code = chars.next().unwrap_or('%');
            let padded = code != '-';
            if !padded {
                code = chars.next().unwrap_or('-');
            }
            out += &self.field(code, padded);
        }
        out
    }

    fn field(&self, code: char, padded: bool) -> String {
        let two = |n: u32| if padded { format!("{n:02}") } else { n.to_string() };
        let day_of_year = self.day_of_year();
        match code {
            'Y' => self.year.to_string(),
            'y' => two(self.year.rem_euclid(100) as u32),
            'm' => two(self.month),
            'd' => two(self.day),
            'e' => format!("{:2}", self.day),
            'H' => two(self.hour),
            'I' => two((self.hour + 11) % 12 + 1),
            'M' => two(self.minute),
            'S' => two(self.second),
            'p' => if self.hour < 12 { "AM" } else { "PM" }.to_string(),
            'j' => {
                if padded {
                    format!("{day_of_year:03}")
                } else {
                    day_of_year.to_string()
                }
            }
            'B' => self.month_name().to_string(),
            'b' | 'h' => self.month_name()[..3].to_string(),
            'A' => self.weekday().to_string(),
            'a' => self.weekday()[..3].to_string(),
            'F' => self.strftime("%Y-%m-%d"),
            'D' => self.strftime("%m/%d/%y"),
            'T' => self.strftime("%H:%M:%S"),
            'R' => self.strftime("%H:%M"),
            'Z' => "UTC".to_string(),
            'z' => "+0000".to_string(),
            '%' => "%".to_string(),
            other => format!("%{other}"),
        }
    }

    fn day_of_year(&self) -> u32 {
        let leap = self.year % 4 == 0 && (self.year % 100 != 0 || self.year % 400 == 0);
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        before[(self.month as usize - 1) % 12] + self.day + u32::from(leap && self.month > 2)
    }

    fn month_name(&self) -> &'static str {
        let names = [
            "January",
            "February",
            "March",
            "April",
            "May",
            "June",
            "July",
            "August",
            "September",
            "October",
            "November",
            "December",
        ];
        names[(self.month as usize - 1) % 12]
    }

    fn weekday(&self) -> &'static str {
        let years = self.year - 1; // 0001-01-01 was a Monday
        let days =
            years * 365 + years.div_euclid(4) - years.div_euclid(100) + years.div_euclid(400);
        let names = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
        names[(days + i64::from(self.day_of_year()) - 1).rem_euclid(7) as usize]
    }
}

/// Adds Python's behaviour to an environment.
pub fn install(env: &mut Environment<'static>, clock: Arc<dyn Fn() -> Clock + Send + Sync>) {
    env.set_formatter(|out, _, value| out.write_str(&str_of(value)).map_err(Error::from));
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: Value| str_of(&value));
    env.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", move |format: String| clock().strftime(&format));
}

/// Python's `str(value)`; undefined is empty.
pub fn str_of(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_string(),
        _ => repr_of(value),
    }
}

/// Python's `repr(value)`.
pub fn repr_of(value: &Value) -> String {
    let mut out = String::new();
    repr(value, &mut out, 0);
    out
}

fn repr(value: &Value, out: &mut String, depth: usize) {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => repr_string(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq if depth < MAX_DEPTH => {
            let items: Vec<Value> = value.try_iter().map(|i| i.collect()).unwrap_or_default();
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                repr(item, out, depth + 1);
            }
            out.push_str(if value.is_tuple() && items.len() == 1 { "," } else { "" });
            out.push(close);
        }
        ValueKind::Map if depth < MAX_DEPTH && value.try_iter().is_ok() => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                repr(&key, out, depth + 1);
                out.push_str(": ");
                repr(&value.get_item(&key).unwrap_or_default(), out, depth + 1);
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
}

const MAX_DEPTH: usize = 128;

fn repr_string(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if (c as u32) < 0x20 || (0x7F..0xA1).contains(&(c as u32)) => {
                _ = write!(out, "\\x{:02x}", c as u32)
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// Python's `repr` of an int or float.
fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(x) if !value.is_integer() => float(x),
        _ => value.to_string(),
    }
}

fn float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() { "nan".into() } else { if x > 0.0 { "inf" } else { "-inf" }.into() };
    }
    // Rust and Python print the same shortest digits; only the choice of notation differs
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{x}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// Python's `json.dumps`, with `ensure_ascii=False` by default. No HTML escapes.
fn tojson(value: Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let argument = |i: usize, name: &str| -> Result<Option<Value>, Error> {
        let named: Option<Value> = kwargs.get(name)?;
        Ok(named.or_else(|| args.get(i).cloned()).filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = match argument(1, "indent")? {
        Some(v) => match v.as_str() {
            Some(text) => Some(text.to_string()),
            None => Some(" ".repeat(v.as_usize().unwrap_or(0).min(64))),
        },
        None => None,
    };
    let (mut item, mut key) =
        (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string());
    if let Some(pair) = argument(2, "separators")? {
        item = pair.get_item_by_index(0)?.as_str().unwrap_or(", ").to_string();
        key = pair.get_item_by_index(1)?.as_str().unwrap_or(": ").to_string();
    }
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let mut json = Json { out: String::new(), ensure_ascii, indent, item, key, sort_keys };
    json.write(&value, 0)?;
    Ok(Value::from(json.out))
}

struct Json {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl Json {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let text = number(value);
                let json = match text.as_str() {
                    "nan" => "NaN",
                    "inf" => "Infinity",
                    "-inf" => "-Infinity",
                    other => other,
                };
                self.out.push_str(json);
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.between(i, depth + 1);
                    self.write(item, depth + 1)?;
                }
                self.close(items.is_empty(), depth, ']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.out.push('{');
                for (i, key) in keys.iter().enumerate() {
                    self.between(i, depth + 1);
                    match key.kind() {
                        ValueKind::None => self.string("null"),
                        ValueKind::Bool => {
                            self.string(if key.is_true() { "true" } else { "false" })
                        }
                        _ => self.string(&str_of(key)),
                    }
                    self.out.push_str(&self.key.clone());
                    self.write(&value.get_item(key)?, depth + 1)?;
                }
                self.close(keys.is_empty(), depth, '}');
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("{kind} has no JSON form (tojson)"),
                ));
            }
        }
        Ok(())
    }

    fn between(&mut self, i: usize, depth: usize) {
        if i > 0 {
            self.out.push_str(&self.item.clone());
        }
        self.newline(depth);
    }

    fn close(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.newline(depth);
        }
        self.out.push(bracket);
    }

    fn newline(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 => _ = write!(self.out, "\\u{:04x}", c as u32),
                c if self.ensure_ascii && !c.is_ascii() => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_python_prints_them() {
        let cases = [
            (1.0, "1.0"),
            (1e-5, "1e-05"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (0.0001, "0.0001"),
        ];
        for (x, text) in cases.into_iter().chain([
            (1e22, "1e+22"),
            (-0.0, "-0.0"),
            (123.456, "123.456"),
            (5e-324, "5e-324"),
        ]) {
            assert_eq!(float(x), text);
        }
    }

    #[test]
    fn the_clock_is_right_on_known_days() {
        let c = Clock::from_unix(1741529107);
        assert_eq!(c, Clock { year: 2025, month: 3, day: 9, hour: 14, minute: 5, second: 7 });
        assert_eq!(
            c.strftime("%A %d %b %Y %-d %I%p %j %y %%"),
            "Sunday 09 Mar 2025 9 02PM 068 25 %"
        );
        assert_eq!(Clock::from_unix(951782399).strftime("%F %T %a"), "2000-02-28 23:59:59 Mon");
        assert_eq!(Clock::from_unix(-1).strftime("%F %j"), "1969-12-31 365");
    }
}
