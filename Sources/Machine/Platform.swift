import Boot
import Glibc
import HostSystem

/// The small fixed devices: reset and sleep control, timer, clock, keyboard controller stub.
struct Platform: Sendable {
  enum Request: Equatable {
    case none
    case reset
    case powerOff
  }

  private var clockIndex: UInt8 = 0
  private var clockMemory = [UInt8](repeating: 0, count: 128)
  private var resetControl: UInt8 = 0
  /// Events not yet read by the guest; the interrupt line is high while any is set.
  var genericEvents: UInt8 = 0

  // MARK: reads

  /// One byte of a port; `nil` when no device is there.
  mutating func read(_ port: UInt16) -> UInt8? {
    switch port {
    // The keyboard controller exists only for its reset line: nothing to read, ready to be written.
    case 0x60, 0x64: return 0
    // Bit 5, the speaker timer's output: loops that calibrate with it end at once.
    case 0x61: return 0x20
    case 0x70: return clockIndex
    case 0x71: return clockRegister(clockIndex & 0x7F)
    case 0xCF9: return resetControl
    case PlatformPort.sleepAndReset: return 0
    case PlatformPort.genericEvent:
      defer { genericEvents = 0 }
      return genericEvents
    default: return nil
    }
  }

  /// The power management timer: 32 bits at 3.579545 MHz.
  static var powerManagementTimer: UInt32 {
    let product = MonotonicTime.now.nanoseconds.multipliedFullWidth(by: 3_579_545)
    // The quotient fits: the high half is below the divisor until 160 years after boot.
    return UInt32(truncatingIfNeeded: UInt64(1_000_000_000).dividingFullWidth(product).quotient)
  }

  // MARK: writes

  mutating func write(_ port: UInt16, _ value: UInt8) -> Request {
    switch port {
    case 0x64: return value == 0xFE ? .reset : .none
    case 0x70: clockIndex = value
    case 0x71:
      // Shut-down code 0 written with the index's top bit set is how some kernels reset.
      if clockIndex == 0x8F, value == 0 { return .reset }
      clockMemory[Int(clockIndex & 0x7F)] = value
    case 0xCF9:
      resetControl = value & 0x0E
      if value & 0x04 != 0 { return .reset }
    case PlatformPort.sleepAndReset:
      if value == PlatformPort.resetValue { return .reset }
      if value == PlatformPort.powerOffValue { return .powerOff }
    default: break
    }
    return .none
  }

  // MARK: time of day

  private func clockRegister(_ index: UInt8) -> UInt8 {
    let value: Int
    switch index {
    case 0x0A: return 0x26
    // 24 hours, binary-coded decimal.
    case 0x0B: return 0x02
    case 0x0C: return 0
    case 0x0D: return 0x80
    case 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32:
      var now = timespec()
      // SAFETY: `now` is ours and alive for the call.
      unsafe clock_gettime(CLOCK_REALTIME, &now)
      let date = CalendarDate(secondsSince1970: now.tv_sec)
      switch index {
      case 0x00: value = date.second
      case 0x02: value = date.minute
      case 0x04: value = date.hour
      case 0x06: value = date.weekday
      case 0x07: value = date.day
      case 0x08: value = date.month
      case 0x09: value = date.year % 100
      default: value = date.year / 100
      }
    default: return clockMemory[Int(index)]
    }
    return UInt8(value / 10 << 4 | value % 10)
  }
}

/// Date and time in UTC, computed without libc, whose conversion opens time zone files.
struct CalendarDate: Equatable {
  var year, month, day, hour, minute, second: Int
  /// 1 = Sunday
  var weekday: Int

  init(secondsSince1970 seconds: Int) {
    let days = (seconds - (seconds % 86400 + 86400) % 86400) / 86400
    let rest = seconds - days * 86400
    hour = rest / 3600
    minute = rest / 60 % 60
    second = rest % 60
    weekday = ((days + 4) % 7 + 7) % 7 + 1
    // Days since 1 March of year 0, in eras of 400 years.
    let shifted = days + 719_468
    let era = (shifted >= 0 ? shifted : shifted - 146_096) / 146_097
    let dayOfEra = shifted - era * 146_097
    let yearOfEra = (dayOfEra - dayOfEra / 1460 + dayOfEra / 36_524 - dayOfEra / 146_096) / 365
    let dayOfYear = dayOfEra - (365 * yearOfEra + yearOfEra / 4 - yearOfEra / 100)
    let shiftedMonth = (5 * dayOfYear + 2) / 153
    day = dayOfYear - (153 * shiftedMonth + 2) / 5 + 1
    month = shiftedMonth < 10 ? shiftedMonth + 3 : shiftedMonth - 9
    year = yearOfEra + era * 400 + (month <= 2 ? 1 : 0)
  }
}
