//! Selectors of metrics: nothing but label text comes out of one, and a refusal names a place in it.
#![no_main]

mod readable;

use libfuzzer_sys::fuzz_target;
use readable::readable;
use sysdig_metrics_adapter::selector::{Operator, Tuning, label_selector, parse, settle};

fn is_label(text: &str) -> bool {
    text.len() <= 63 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

fuzz_target!(|text: &str| {
    let parsed = parse(text);
    readable(&parsed);
    let requirements = match parsed {
        Ok(requirements) => requirements,
        Err(error) => {
            let (_, rest) = error.message.split_once("not understood at position ").expect("the place is named");
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            let position: usize = digits.parse().expect("a place is a number");
            assert!((1..=text.len() + 1).contains(&position) && text.is_char_boundary(position - 1), "{position}");
            let before = text.as_bytes().get(..position - 1).expect("it lies in the text");
            assert!(before.is_empty() || before.ends_with(b","), "it is where a part begins: {position}");
            return;
        }
    };
    assert_eq!(requirements.is_empty(), text.is_empty());
    for requirement in &requirements {
        let (prefix, name) = requirement.key.split_once('/').unwrap_or(("x", &requirement.key));
        assert!(is_label(prefix) && is_label(name) && !prefix.is_empty() && !name.is_empty(), "{requirement:?}");
        assert!(requirement.values.iter().all(|value| is_label(value)), "{requirement:?}");
        let single = matches!(requirement.operator, Operator::Exists | Operator::DoesNotExist);
        assert_eq!(requirement.values.is_empty(), single, "{requirement:?}");
    }
    let (labels, Tuning { time, group, window }) = settle(&requirements);
    assert!(labels.iter().all(|label| !label.key.starts_with("sysdig/")));
    assert!(["avg", "timeAvg", "sum", "min", "max"].contains(&time));
    assert!(["", "avg", "sum", "min", "max"].contains(&group));
    assert!((20..=600).contains(&window) && window % 10 == 0);
    assert_eq!(label_selector(&requirements).is_null(), requirements.is_empty());
});
