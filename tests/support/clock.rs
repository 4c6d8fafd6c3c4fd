//! The time of this machine, and polling with a deadline.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const DAY: i64 = 86_400;
const PAUSE: Duration = Duration::from_millis(5);

/// Unix seconds.
pub fn unix_now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970");
    now.as_secs().try_into().expect("the clock is before the year 292 billion")
}

/// As in a `Date` header (RFC 9110, section 5.6.7).
pub fn http_date(unix: i64) -> String {
    let (days, seconds) = (unix.div_euclid(DAY), unix.rem_euclid(DAY));
    let (mut year, mut left) = (1970, days);
    while left >= length_of_year(year) {
        left -= length_of_year(year);
        year += 1;
    }
    let february = length_of_year(year) - 337;
    let mut months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
        .into_iter()
        .zip([31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]);
    let month = months.find(|(_, length)| {
        let found = left < *length;
        left -= if found { 0 } else { *length };
        found
    });
    let (month, _) = month.expect("fewer days are left than the year has");
    // 1970-01-01 was a Thursday.
    let weekday = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"][days.rem_euclid(7) as usize];
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{weekday}, {:02} {month} {year} {hour:02}:{minute:02}:{second:02} GMT", left + 1)
}

/// Asks until there is an answer; None when `patience` is over.
pub fn poll<T>(patience: Duration, mut question: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(answer) = question() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(PAUSE);
    }
}

/// Waits for a condition. Panics with `what` when `patience` is over.
#[track_caller]
pub fn eventually(what: &str, patience: Duration, mut condition: impl FnMut() -> bool) {
    assert!(poll(patience, || condition().then_some(())).is_some(), "not within {patience:?}: {what}");
}

fn length_of_year(year: i64) -> i64 {
    if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) { 366 } else { 365 }
}
