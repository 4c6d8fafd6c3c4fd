//! DER subjects: a common name is found only where it stands.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sysdig_metrics_adapter::der::common_name;

fuzz_target!(|subject: &[u8]| {
    let Some(name) = common_name(subject) else { return };
    let wanted = name.as_bytes();
    assert!(wanted.is_empty() || subject.windows(wanted.len()).any(|window| window == wanted), "{name:?}");
    assert!(subject.windows(3).any(|window| window == [0x55, 0x04, 0x03]), "there is no commonName in it");
    // Half a subject is none.
    for length in 1..subject.len() {
        if let Some(shorter) = common_name(&subject[..length]) {
            assert!(!shorter.is_empty() || !wanted.is_empty() || shorter == name);
        }
    }
    let twice = [subject, subject].concat();
    assert_eq!(common_name(&twice), Some(name), "the last one counts");
});
