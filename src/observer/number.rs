//! Numbers in readable form: losses, rates, bytes, times. Layer 0.
//!
//! Invariant: every value takes at most ten characters; NaN is "nan".

use std::time::Duration;

/// A measured value, with up to four decimal places.
pub fn decimal(v: f64) -> String {
    if !v.is_finite() {
        return if v.is_nan() { "nan".into() } else { format!("{v}") };
    }
    match v.abs() {
        0.0 => "0".into(),
        a if a < 5e-4 => small(v),
        a if a < 100.0 => format!("{v:.4}"),
        a if a < 10_000.0 => format!("{v:.2}"),
        _ => count(v),
    }
}

/// A small number in exponential form: `1.5e-5`.
pub fn small(v: f64) -> String {
    if v == 0.0 { "0".into() } else { format!("{v:.2e}") }
}

/// A whole number in groups of three digits; from ten million on with M, G or T.
pub fn count(v: f64) -> String {
    if !v.is_finite() {
        return decimal(v);
    }
    for (from, unit, letter) in [(1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e7, 1e6, "M")] {
        if v.abs() >= from {
            let scaled = v / unit;
            return if scaled.abs() < 1e4 {
                format!("{scaled:.1}{letter}")
            } else {
                format!("{v:.2e}")
            };
        }
    }
    let digits = format!("{:.0}", v.abs());
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    let sign = if v < 0.0 && digits != "0" { "-" } else { "" };
    format!("{sign}{}", groups.collect::<Vec<_>>().join(","))
}

/// A fraction as a percentage: `43.1%`.
pub fn percent(v: f64) -> String {
    if v.is_finite() { format!("{:.1}%", 100.0 * v) } else { decimal(v) }
}

/// Bytes in MiB, or in GiB from 1 GiB on.
pub fn bytes(v: f64) -> String {
    let (mib, gib) = (1024.0 * 1024.0, 1024.0 * 1024.0 * 1024.0);
    if v < gib { format!("{:.1} MiB", v / mib) } else { format!("{:.2} GiB", v / gib) }
}

/// `0:07`, `12:34`, `1:02:03`, `2d 03:04`.
pub fn clock(time: Duration) -> String {
    let s = (time.as_secs_f64() + 0.5) as u64;
    let (days, hours, minutes, seconds) = (s / 86400, s / 3600 % 24, s / 60 % 60, s % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes}:{seconds:02}"),
        (0, _) => format!("{hours}:{minutes:02}:{seconds:02}"),
        (d, _) if d < 10_000 => format!("{d}d {hours:02}:{minutes:02}"),
        _ => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well_at_every_size() {
        let decimals = [
            (2.345678, "2.3457"),
            (0.1, "0.1000"),
            (1.5e-5, "1.50e-5"),
            (-0.0004, "-4.00e-4"),
            (10850.0, "10,850"),
            (9999.994, "9999.99"),
            (-123.456, "-123.46"),
            (1234567.0, "1,234,567"),
            (0.0, "0"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ];
        for (v, text) in decimals {
            assert_eq!(decimal(v), text);
        }
        let counts =
            [(33900.4, "33,900"), (4.9e7, "49.0M"), (-0.2, "0"), (2.5e9, "2.5G"), (7.0, "7")];
        for (v, text) in counts {
            assert_eq!(count(v), text);
        }
        let times = [(0.4, "0:00"), (59.6, "1:00"), (3723.0, "1:02:03"), (183_840.0, "2d 03:04")];
        for (s, text) in times {
            assert_eq!(clock(Duration::from_secs_f64(s)), text);
        }
        let sizes = [(1_802_240.0, "1.7 MiB"), (5.0 * 1_073_741_824.0, "5.00 GiB")];
        for (v, text) in sizes {
            assert_eq!(bytes(v), text);
        }
    }

    #[test]
    fn no_value_breaks_a_column() {
        for exponent in -300..300 {
            for sign in [-1.0, 1.0] {
                for mantissa in [1.0, 9.99999] {
                    let v = sign * mantissa * 10f64.powi(exponent);
                    assert!(decimal(v).len() <= 10, "{v}: {}", decimal(v));
                    assert!(count(v).len() <= 10, "{v}: {}", count(v));
                }
            }
        }
        assert_eq!(clock(Duration::MAX), "-");
    }
}
