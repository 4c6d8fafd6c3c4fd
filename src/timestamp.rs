//! Seconds since 1970 as RFC 3339 text in UTC, the form Kubernetes calls `Time`.
//! Source: <https://www.rfc-editor.org/rfc/rfc3339>.

use std::{time::SystemTime, time::UNIX_EPOCH};

pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// `2019-07-07T15:55:27Z`; later than the year 9999 is shown as its last second. The year starts in March here, so
/// that the leap day ends it. Source: Neri and Schneider, <https://arxiv.org/abs/2102.06959>.
pub(crate) fn rfc3339(unix_seconds: u64) -> String {
    let seconds = unix_seconds.min(253_402_300_799);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // Four centuries have 146,097 days, four years 1,461, and five months from March on 153.
    let days = 4 * (seconds / 86_400 + 719_468) + 3;
    let (century, days) = (days / 146_097, 4 * (days % 146_097 / 4) + 3);
    let (year, days) = (days / 1461, 5 * (days % 1461 / 4) + 461);
    let (month, day) = (days / 153, days % 153 / 5 + 1);
    let (month, later) = if month <= 12 { (month, 0) } else { (month - 12, 1) };
    format!("{:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", century * 100 + year + later)
}

/// The second of the day in `Sun, 06 Nov 1994 08:49:37 GMT`. Source: <https://www.rfc-editor.org/rfc/rfc9110#name-date>.
pub(crate) fn second_of_day(http_date: &str) -> Option<i64> {
    let time = http_date.split(' ').nth(4)?.split(':').map(|part| part.parse().ok().filter(|it| (0..60).contains(it)));
    let [hour, minute, second] = time.collect::<Option<Vec<i64>>>()?[..] else { return None };
    Some((hour * 60 + minute) * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_day_is_read_from_a_header() {
        let table = [
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(31_777)),
            ("Sun, 06 Nov 1994 00:00:00 GMT", Some(0)),
            ("Sun, 06 Nov 1994 23:59:59 GMT", Some(86_399)),
            ("Sun, 06 Nov 1994 08:49:60 GMT", None),
            ("Sun, 06 Nov 1994 08:49 GMT", None),
            ("Sun, 06 Nov 1994 08:49:37:1 GMT", None),
            ("Sun, 06 Nov 1994 -1:00:00 GMT", None),
            ("Sunday, 06-Nov-94 08:49:37 GMT", None),
            ("", None),
        ];
        for (text, seconds) in table {
            assert_eq!(second_of_day(text), seconds, "{text}");
        }
    }

    #[test]
    fn seconds_are_named_as_people_name_them() {
        let table = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_562_514_927, "2019-07-07T15:55:27Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (253_402_300_799, "9999-12-31T23:59:59Z"),
            (u64::MAX, "9999-12-31T23:59:59Z"),
        ];
        for (seconds, text) in table {
            assert_eq!(rfc3339(seconds), text);
        }
    }
}
