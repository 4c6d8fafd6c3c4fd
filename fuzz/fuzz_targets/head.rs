//! Heads at the door: what is accepted is rebuilt into one request that says the same and no more.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sysdig_metrics_adapter::head::{Head, end};

fuzz_target!(|bytes: &[u8]| {
    let found = end(bytes, 0);
    for from in 0..bytes.len().min(64) {
        if found.is_none_or(|found| from < found) {
            assert_eq!(end(bytes, from), found, "from {from}");
        }
    }
    let Some(length) = found else { return };
    let Ok(head) = Head::parse(&bytes[..length]) else { return };
    let rebuilt = head.rebuild(None);
    assert_eq!(end(&rebuilt, 0), Some(rebuilt.len()), "one head and nothing behind it");
    assert!(rebuilt.iter().all(|byte| byte.is_ascii_graphic() || b" \r\n".contains(byte)));
    let text = std::str::from_utf8(&rebuilt).expect("it is ASCII");
    let lower = text.to_ascii_lowercase();
    for header in ["x-remote", "content-length", "transfer-encoding", "upgrade", "expect", "te:"] {
        assert!(!lower.contains(&format!("\r\n{header}")), "{text}");
    }
    assert_eq!(lower.matches("\r\nconnection: close\r\n").count(), 1, "{text}");
    let again = Head::parse(&rebuilt).expect("what is rebuilt is a head");
    assert!(!again.keep_alive);
    // Of a repeated header the last may be empty, which leaves a blank at the end of the line.
    let said = |head: &[u8]| String::from_utf8_lossy(head).lines().map(|it| it.trim_end().to_owned()).collect::<Vec<_>>();
    assert_eq!(said(&again.rebuild(None)), said(&rebuilt));
});
