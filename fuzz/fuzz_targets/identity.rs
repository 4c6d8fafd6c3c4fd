//! Identity headers: whatever bytes a verified proxy sends arrive as they were, or not at all.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sysdig_metrics_adapter::head::{Head, IdentityHeaders, end};
use sysdig_metrics_adapter::route::percent_decode;

fuzz_target!(|bytes: &[u8]| {
    let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let identity = IdentityHeaders {
        username: names(&["x-remote-user", "x-user"]),
        group: names(&["x-remote-group"]),
        uid: names(&["x-remote-uid"]),
        extra_prefix: names(&["x-remote-extra-"]),
    };
    let mut parts = bytes.splitn(4, |byte| *byte == b'\n');
    let mut part = || parts.next().unwrap_or_default();
    let (user, group, key, value) = (part(), part(), part(), part());
    let request = [
        b"GET / HTTP/1.1\r\nHost: a\r\nX-Remote-User: ",
        user,
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
    if bytes.contains(&b'\r') || end(&request, 0) != Some(request.len()) {
        return;
    }
    let Ok(head) = Head::parse(&request) else { return };
    let rebuilt = head.rebuild(Some(&identity));
    let again = Head::parse(&rebuilt).expect("what is rebuilt is a head");
    assert!(!again.keep_alive);
    let text = String::from_utf8(rebuilt).expect("it is ASCII");
    let lines = |name: &str| text.split("\r\n").filter_map(|line| line.strip_prefix(name)).collect::<Vec<_>>();
    for (name, sent) in [("X-Remote-User: ", user), ("X-Remote-Group: ", group)] {
        let (passed, sent) = (lines(name), sent.trim_ascii());
        assert_eq!(passed.len(), usize::from(!sent.is_empty()), "{name} in {text}");
        if let (Some(passed), Ok(sent)) = (passed.first(), std::str::from_utf8(sent)) {
            assert_eq!(percent_decode(passed, false).as_deref(), Some(sent), "{name}");
        }
    }
});
