//! The selector of a metric: labels that its samples must have, and how they become one value. Pure.

use serde_json::{Map, Value};

use crate::config::duration;
use crate::error::{Error, quoted, refusal};

/// A label and the values it may have: letters, digits, `-`, `_`, `.` only, and in the label one `/` at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    pub key: String,
    pub values: Vec<String>,
}

/// How samples become one value: over time and over the containers of an object in Sysdig's words, and the seconds
/// of samples. As Sysdig Monitor itself does by default: `avg` over all, that is load per pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    pub time: &'static str,
    pub group: &'static str,
    pub window: u64,
}

const TIMES: [&str; 5] = ["avg", "timeAvg", "sum", "min", "max"];

/// Understands `label=value,...` and the keys that begin with `sysdig/`.
/// Errors: 400, with the position (from 1) of the part that is not understood.
pub fn parse(text: &str) -> Result<(Vec<Requirement>, Tuning), Error> {
    let (mut labels, mut tuning) = (Vec::new(), Tuning { time: "avg", group: "avg", window: 60 });
    let mut position = 1;
    for part in text.split(',').filter(|_| !text.is_empty()) {
        let (key, value) = part.split_once('=').unwrap_or((part, "!"));
        let (key, value) = (key.trim(), value.strip_prefix('=').unwrap_or(value).trim());
        let known = |list: &[&'static str]| list.iter().copied().find(|known| *known == value);
        // A window holds finished points of 10 s, and never just the newest one.
        let window = duration(value).map(|it| it.as_secs()).filter(|it| (20..=600).contains(it) && it % 10 == 0);
        let (prefix, name) = key.split_once('/').unwrap_or(("x", key));
        let understood = match (prefix, name) {
            ("sysdig", "time-aggregation") => known(&TIMES).map(|it| tuning.time = it),
            ("sysdig", "group-aggregation") => known(&["avg", "sum", "min", "max"]).map(|it| tuning.group = it),
            ("sysdig", "window") => window.map(|it| tuning.window = it),
            ("sysdig" | "", _) | (_, "") => None,
            _ => [prefix, name, value].into_iter().all(is_label).then(|| {
                labels.push(Requirement { key: key.to_owned(), values: vec![value.to_owned()] });
            }),
        };
        understood.ok_or_else(|| {
            refusal!(
                InvalidRequest,
                "the selector of the metric {} is not understood at position {position}: it takes label=value, \
                 sysdig/time-aggregation=avg|timeAvg|sum|min|max, sysdig/group-aggregation=avg|sum|min|max and \
                 sysdig/window=20s to 10m in steps of 10s",
                quoted(text)
            )
        })?;
        position += part.len() + 1;
    }
    Ok((labels, tuning))
}

/// The selector as a LabelSelector object; null if it is empty.
pub fn label_selector(text: &str) -> Value {
    let pairs = text.split(',').filter_map(|part| part.split_once('='));
    let labels = pairs.map(|(key, value)| (key.trim().to_owned(), value.trim_start_matches('=').trim().into()));
    let labels: Map<String, Value> = labels.collect();
    if labels.is_empty() { Value::Null } else { serde_json::json!({ "matchLabels": labels }) }
}

/// What Kubernetes lets stand in a label: nothing that means anything in a query.
fn is_label(text: &str) -> bool {
    let ends = |byte: Option<u8>| byte.is_none_or(|byte| byte.is_ascii_alphanumeric());
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    text.len() <= 63 && text.bytes().all(fits) && ends(text.bytes().next()) && ends(text.bytes().next_back())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_reserved_keys_are_told_apart() {
        let default = Tuning { time: "avg", group: "avg", window: 60 };
        let check = |text: &str, labels: &[(&str, &str)], tuning: Tuning| {
            let (found, tuned) = parse(text).unwrap();
            let pairs: Vec<_> = found.iter().map(|it| (it.key.as_str(), it.values[0].as_str())).collect();
            assert_eq!((pairs.as_slice(), tuned), (labels, tuning), "{text}");
        };
        check("", &[], default);
        check("a=b", &[("a", "b")], default);
        check("a==b , net.http.method=GET", &[("a", "b"), ("net.http.method", "GET")], default);
        check("x.y/a=", &[("x.y/a", "")], default);
        check("sysdig/group-aggregation=sum", &[], Tuning { group: "sum", ..default });
        check("sysdig/group-aggregation=max,a=b", &[("a", "b")], Tuning { group: "max", ..default });
        check("sysdig/time-aggregation=timeAvg", &[], Tuning { time: "timeAvg", ..default });
        check("sysdig/window=20s", &[], Tuning { window: 20, ..default });
        check("sysdig/window=10m", &[], Tuning { window: 600, ..default });
    }

    #[test]
    fn what_is_not_understood_is_named_with_its_position() {
        let longest = "a".repeat(64);
        let table = [
            ("a", 1),
            ("!a", 1),
            ("a!=b", 1),
            ("a=b,a in (b,c)", 5),
            ("a=b,", 5),
            (",", 1),
            ("a=b=c", 1),
            ("a='b'", 1),
            ("a=b\"", 1),
            ("a=-", 1),
            ("=b", 1),
            ("/a=b", 1),
            ("a/=b", 1),
            ("a/b/c=d", 1),
            ("a=b,é=c", 5),
            (&format!("a={longest}"), 1),
            (&format!("{longest}=a"), 1),
            ("a=b,sysdig/group-aggregation=SUM", 5),
            ("sysdig/group-aggregation=", 1),
            ("sysdig/group-aggregation", 1),
            ("sysdig/group-aggregation!=sum", 1),
            ("sysdig/group-aggregation=timeAvg", 1),
            ("sysdig/time-aggregation=median", 1),
            ("sysdig/window=15s", 1),
            ("sysdig/window=10s", 1),
            ("sysdig/window=1h", 1),
            ("sysdig/window=60", 1),
            ("sysdig/nope=1", 1),
        ];
        for (text, position) in table {
            let message = parse(text).expect_err(text).message;
            assert!(message.contains(&format!("not understood at position {position}:")), "{text:?}: {message}");
        }
    }

    #[test]
    fn it_goes_back_as_a_label_selector() {
        assert_eq!(label_selector(""), Value::Null);
        let expected = serde_json::json!({ "matchLabels": { "a": "b", "sysdig/window": "2m" } });
        assert_eq!(label_selector("a==b, sysdig/window=2m"), expected);
    }
}
