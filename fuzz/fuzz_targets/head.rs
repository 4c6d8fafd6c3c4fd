//! Heads at the door: what is accepted is rebuilt into one request that says the same and no more.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sysdig_metrics_adapter::head::Head;

/// The index behind the blank line.
fn end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

fuzz_target!(|bytes: &[u8]| {
    let Some(length) = end(bytes) else { return };
    let Ok(head) = Head::parse(&bytes[..length]) else { return };
    let rebuilt = head.rebuild(None);
    assert_eq!(end(&rebuilt), Some(rebuilt.len()), "one head and nothing behind it");
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
