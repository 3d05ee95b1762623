//! The API key. Layer 9.
//!
//! Invariant: the time of a comparison reveals nothing about the key except its length.

use axum::http::{HeaderMap, StatusCode, header};

use super::error::ApiError;

/// Error: a key is required, and the request does not send it.
pub(super) fn check(key: Option<&str>, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(key) = key else { return Ok(()) };
    let sent = headers.get(header::AUTHORIZATION).and_then(|value| {
        let bytes = value.as_bytes();
        let (scheme, rest) = bytes.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(rest)
    });
    match sent {
        Some(sent) if same(sent, key.as_bytes()) => Ok(()),
        sent => {
            let what = if sent.is_some() { "the API key is wrong" } else { "no API key was sent" };
            let message = format!("{what}; send the header `Authorization: Bearer KEY`");
            Err(ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key"))
        }
    }
}

/// Compares every byte of the key, wherever the first difference is.
fn same(sent: &[u8], key: &[u8]) -> bool {
    let differs = key.iter().enumerate().fold(sent.len() ^ key.len(), |differs, (i, byte)| {
        differs | usize::from(sent.get(i).copied().unwrap_or(0) ^ byte)
    });
    std::hint::black_box(differs) == 0
}

#[cfg(test)]
mod tests {
    use super::same;

    #[test]
    fn only_the_whole_key_is_the_key() {
        assert!(same(b"secret", b"secret"));
        for wrong in [&b""[..], b"secre", b"secrets", b"Secret", b"secret\0"] {
            assert!(!same(wrong, b"secret"), "{wrong:?}");
        }
    }
}
