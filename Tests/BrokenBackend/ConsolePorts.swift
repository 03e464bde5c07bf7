import Glibc
import VirtioSpec

extension Session {
  /// A control message of the driver; what is to be said to it waits in `announcements`.
  func control(_ bytes: [UInt8]) {
    guard bytes.count >= ConsoleControl.byteCount else { return odd() }
    func number(_ offset: Int, _ count: Int) -> UInt32 { (0..<count).reduce(0) { $0 | UInt32(bytes[offset + $1]) << UInt32(8 * $1) } }
    let port = number(0, 4)
    switch UInt16(number(4, 2)) {
    case ConsoleControl.deviceReady where number(6, 2) == 1:
      say(0, ConsoleControl.portAdd)
      say(has("port-number") ? 7 : has("port-twice") ? 0 : 1, ConsoleControl.portAdd)
    case ConsoleControl.portReady where port < 2 && number(6, 2) == 1:
      if port == 0 { say(0, ConsoleControl.consolePort, 1) }
      if port == 0 { say(0, ConsoleControl.resize, 0, [25, 0, 80, 0]) }
      if port == 1 { say(1, ConsoleControl.portName, 0, Array("org.example.second".utf8)) }
      say(port, has("port-event") ? 99 : ConsoleControl.portOpen, 1)
    case ConsoleControl.portOpen where port < 2: break
    default: odd()
    }
  }

  private func odd() { if has("port-abort") { abort() } }

  private func say(_ port: UInt32, _ event: UInt16, _ value: UInt16 = 1, _ rest: [UInt8] = []) {
    let head = [UInt8(port), 0, 0, 0, UInt8(event), 0, UInt8(value), 0]
    announcements.append(head + rest)
  }
}
