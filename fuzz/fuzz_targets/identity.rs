//! Identity headers: whatever bytes a verified proxy sends arrive as they were, or not at all.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use sysdig_metrics_adapter::head::{Head, IdentityHeaders};
use sysdig_metrics_adapter::route::percent_decode;

fuzz_target!(|bytes: &[u8]| {
    let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let identity: IdentityHeaders =
        [&["x-remote-user", "x-user"][..], &["x-remote-uid"], &["x-remote-group"], &["x-remote-extra-"]].map(names);
    let mut parts = bytes.splitn(4, |byte| *byte == b'\n');
    let mut part = || parts.next().unwrap_or_default();
    let (user_sent, group, key, value) = (part(), part(), part(), part());
    let request = [
        b"GET / HTTP/1.1\r\nHost: a\r\nX-Remote-User: ",
        user_sent,
        b"\r\nX-Remote-Group: ",
        group,
        b"\r\nX-Remote-Extra-",
        key,
        b": ",
        value,
        b"\r\n\r\n",
    ]
    .concat();
    // Lines of its own are the business of the target `head`.
    if bytes.contains(&b'\r') {
        return;
    }
    let Ok(head) = Head::parse(&request) else { return };
    let rebuilt = head.rebuild(Some(&identity));
    let again = Head::parse(&rebuilt).expect("what is rebuilt is a head");
    assert!(!again.keep_alive);
    let text = String::from_utf8(rebuilt).expect("it is ASCII");
    let passed = text.split("\r\n").find_map(|line| line.strip_prefix("X-Remote: ")).expect("one line names the user");
    let user: Value = serde_json::from_str(&percent_decode(passed).expect("it is encoded")).expect("it is JSON");
    let sent = |bytes: &[u8]| String::from_utf8(bytes.trim_ascii().to_vec()).ok().filter(|text| !text.is_empty());
    assert_eq!(user["user"].as_str().unwrap_or_default(), sent(user_sent).unwrap_or_default(), "{text}");
    assert_eq!(user["groups"], json!(sent(group).into_iter().collect::<Vec<_>>()), "{text}");
});
