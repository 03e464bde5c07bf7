import ControlProtocol
import Glibc
import HostSystem

let controlVerb = Verb(
  name: "ctl", usage: "martlet ctl --control PATH REQUEST [--json]", summary: "ask or order a running virtual machine",
  help: {
    var text = "usage: martlet ctl --control PATH REQUEST [--json]\n\nPATH is that of martlet run --control.\n\nRequests:\n"
    for verb in ControlVerb.allCases { text += HelpText.line("  \(verb.usage)", verb.summary) }
    text += "\nOptions:\n" + HelpText.line("  --json", "print the answer as one JSON object")
    return text + "\nExit codes: 0 done, 1 refused, 2 wrong command line, 3 no answer on the socket.\n"
  },
  run: { arguments in
    do throws(ConfigurationError) {
      let request = try ControlRequest(arguments)
      return request.perform()
    } catch {
      Log.error(error.message.replacing("martlet run", with: "martlet ctl"))
      return .usage
    }
  })

/// The command line of `martlet ctl`.
struct ControlRequest {
  private let path: String
  private let verb: ControlVerb
  private let words: [String]
  private let isJSON: Bool
  private let patience: Duration

  init(_ arguments: [String]) throws(ConfigurationError) {
    var path: String?
    var verb: ControlVerb?
    var words: [String] = []
    var isJSON = false
    var removal: [String] = []
    var patience = Duration.seconds(10)
    var rest = arguments[...]
    let example = "--control web1.ctl"
    let names = ControlVerb.allCases.map(\.rawValue)
    while let word = rest.popFirst() {
      if word == "--json" {
        isJSON = true
      } else if verb == .remove, word == "--force" {
        removal.append("force")
      } else if verb == .remove, word == "--timeout" || word.hasPrefix("--timeout=") {
        guard let value = word == "--timeout" ? rest.popFirst() : String(word.dropFirst("--timeout=".count)),
          let number = Quantity.unsigned(value), (1...VMConfiguration.Limits.milliseconds).contains(number)
        else {
          throw .badValue(
            place: "--timeout", value: rest.first ?? "", expected: "milliseconds from 1 to \(VMConfiguration.Limits.milliseconds)")
        }
        removal.append("timeout=\(number)")
        patience = .milliseconds(Int64(number) + 10_000)
      } else if word == "--control" {
        guard let value = rest.popFirst(), !value.hasPrefix("--") else {
          throw .missingValue(option: "control", example: example)
        }
        path = value
      } else if word.hasPrefix("--control=") {
        path = String(word.dropFirst("--control=".count))
      } else if word == "--follow", verb == nil || verb == .events, words.isEmpty {
        words.append(word)
      } else if word.hasPrefix("--") {
        let name = String(word.dropFirst(2))
        let known = ["control", "json"] + (verb == .remove ? ["force", "timeout"] : [])
        throw .unknownOption(name, nearest: EditDistance.nearest(to: name, in: known))
      } else if let known = ControlVerb(rawValue: word), verb == nil {
        verb = known
      } else if verb == nil {
        throw .unknownRequest(word, nearest: EditDistance.nearest(to: word, in: names), known: names)
      } else if let verb, verb != .events, words.count < (verb == .remove ? 1 : verb.arguments.count), !word.isEmpty,
        verb == .add || !word.contains(" "),
        !word.contains("\n")
      {
        words.append(word)
      } else {
        throw .unexpectedArgument(word)
      }
    }
    guard let path else { throw .missingOption("control", example: example) }
    guard VMConfiguration.isSocketPath(path) else {
      throw .badValue(place: "--control", value: path, expected: "a socket path of 1 to 107 bytes")
    }
    guard let verb else { throw .missingRequest(known: names) }
    if verb != .events, words.first == "--follow" { throw .unknownOption("follow", nearest: nil) }
    guard words.count >= verb.neededArguments else {
      throw .missingOption(verb.arguments[words.count], example: "martlet ctl --control \(path) \(verb.usage)")
    }
    self.path = path
    self.verb = verb
    // What follows is started, or asked of the guest.
    if verb == .add || (verb == .remove && patience == .seconds(10)) { patience = .seconds(30) }
    if verb == .add {
      let order = try DeviceOrder(words: words.joined(separator: " "))
      words = [order.kind.rawValue, order.absolute(from: Self.directory).value]
    }
    self.words = words + removal
    self.patience = patience
    self.isJSON = isJSON
  }

  private static var directory: String {
    // SAFETY: getcwd allocates, we free.
    guard let path = unsafe getcwd(nil, 0) else { return "" }
    defer { unsafe free(path) }
    return unsafe String(cString: path)
  }

  func perform() -> ExitCode {
    let answer: JSONValue
    do throws(SystemError) {
      let line = try LineSocket(path)
      try line.send(([verb.rawValue] + words).joined(separator: " "))
      guard let first = try line.next(within: patience) else {
        throw SystemError("read an answer from '\(path)': the VM has ended", .connectionReset)
      }
      answer = first
      if verb == .events, answer["ok"]?.bool == true {
        show(answer["events"]?.array ?? [])
        // Until the VM ends or nobody reads what we print.
        while !words.isEmpty, let event = try line.next(within: nil) { show([event]) }
        return .success
      }
    } catch {
      switch error.errno {
      case .noEntry: Log.error("No VM has the control socket '\(path)'; it is made by martlet run --control")
      case .connectionRefused: Log.error("Nobody listens at '\(path)'; the VM has ended")
      default: Log.error(error.description)
      }
      return .resource
    }
    let isDone = answer["ok"]?.bool == true
    if isJSON {
      Output.standard.write(answer.text + "\n")
    } else if isDone {
      Output.standard.write(ControlText.describe(verb, answer))
    } else {
      Log.error(answer["error"]?.string ?? "The VM gave no answer that can be read")
    }
    return isDone ? .success : ExitCode(rawValue: 1)
  }

  private func show(_ events: [JSONValue]) {
    for event in events { Output.standard.write(isJSON ? event.text + "\n" : ControlText.event(event)) }
  }
}

/// A connection to a VM: request lines out, JSON lines in.
private final class LineSocket {
  private let path: String
  private let socket: OwnedFD
  private var received: [UInt8] = []
  private var buffer = [UInt8](repeating: 0, count: 65536)

  init(_ path: String) throws(SystemError) {
    self.path = path
    socket = try UnixSocket.connect(to: path, timeout: .seconds(5))
  }

  func send(_ line: String) throws(SystemError) { try socket.writeAll(Array((line + "\n").utf8)) }

  /// The next line; nil when the other end has closed.
  /// - Parameter time: how long to wait; nil for as long as it takes.
  func next(within time: Duration?) throws(SystemError) -> JSONValue? {
    let end = time.map { MonotonicTime.now.advanced(by: $0) }
    while !received.contains(10) {
      let left = end?.since(.now)
      guard left.map({ $0 > .zero }) ?? true, received.count < JSONValue.lengthLimit else {
        throw SystemError("read an answer from '\(path)'", .timedOut)
      }
      guard try socket.waitUntil(.readable, timeout: left) else { continue }
      // SAFETY: the buffer is lent for the call.
      switch unsafe buffer.withUnsafeMutableBytes({ bytes in unsafe socket.read(into: bytes) }) {
      case .bytes(let count): received += buffer[..<count]
      case .wouldBlock: continue
      case .end: return nil
      case .failed(let error): throw SystemError("read an answer from '\(path)'", error)
      }
    }
    let line = Array(received.prefix { $0 != 10 })
    received.removeFirst(line.count + 1)
    do throws(JSONError) { return try JSONValue(parsing: line) } catch {
      throw SystemError("understand the answer from '\(path)'", .invalid)
    }
  }
}
