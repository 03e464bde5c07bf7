import ControlProtocol
import Glibc
import HostSystem

let controlVerb = Verb(
  name: "ctl", usage: "martlet ctl --control PATH REQUEST [--json]", summary: "ask or order a running virtual machine",
  help: {
    var text = "usage: martlet ctl --control PATH REQUEST [--json]\n\nPATH is that of martlet run --control.\n\nRequests:\n"
    for verb in ControlVerb.allCases { text += HelpText.line("  \(verb.usage)", verb.summary) }
    text += "\nOptions of replace:\n"
    for (option, summary) in ReplaceOrder.optionLines { text += HelpText.line("  \(option)", summary) }
    text += HelpText.line(
      "  -- PROGRAM ...", "another build of ours, or with --jail somebody else's; left out: the present one, as it is installed now")
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
      if verb == .replace, word != "--json", word != "--control", !word.hasPrefix("--control=") {
        words.append(word)
        guard word == "--" else { continue }
        // The program's own words, whatever they look like.
        words += rest
        rest = []
      } else if word == "--json" {
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
      } else if word == "--dry-run", verb == nil || verb == .upgradeSupervisor, words.isEmpty {
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
    if verb != .upgradeSupervisor, words.first == "--dry-run" { throw .unknownOption("dry-run", nearest: nil) }
    guard words.count >= verb.neededArguments else {
      throw .missingOption(verb.arguments[words.count], example: "martlet ctl --control \(path) \(verb.usage)")
    }
    self.path = path
    self.verb = verb
    // What follows is started, or asked of the guest.
    if verb == .upgradeSupervisor { patience = .seconds(60) }
    if verb == .add || (verb == .remove && patience == .seconds(10)) { patience = .seconds(30) }
    if verb == .replace {
      let order = try ReplaceOrder(words: words).absolute(from: Self.directory, find: Self.find)
      words = [order.line]
      // Its process starts, the core looks at it, what is in flight ends: each has its own limit.
      patience = .milliseconds(Int64(order.drain) + 120_000)
    }
    if verb == .add {
      let order = try DeviceOrder(words: words.joined(separator: " "))
      words = [order.kind.rawValue, order.absolute(from: Self.directory).value]
    }
    self.words = words + removal
    self.patience = patience
    self.isJSON = isJSON
  }

  /// The path of a program, as a shell would find it.
  private static func find(_ name: String) -> String? {
    let path = unsafe getenv("PATH").map { unsafe String(cString: $0) } ?? "/usr/bin:/bin"
    return path.split(separator: ":").map { "\($0)/\(name)" }.first { path in
      // SAFETY: a NUL-terminated copy that lives for the call.
      unsafe access(path, X_OK) == 0
    }
  }

  private static var directory: String {
    // SAFETY: getcwd allocates, we free.
    guard let path = unsafe getcwd(nil, 0) else { return "" }
    defer { unsafe free(path) }
    return unsafe String(cString: path)
  }

  /// One device after the other, then the supervisor; the first failure ends it, with everything as it was from there on.
  private func upgrade() throws(SystemError) -> JSONValue {
    func ask(_ words: String) throws(SystemError) -> JSONValue {
      let line = try LineSocket(path)
      try line.send(words)
      guard let answer = try line.next(within: .seconds(130)) else {
        throw SystemError("read an answer from '\(path)': the VM has ended", .connectionReset)
      }
      return answer
    }
    let known = try ask(ControlVerb.devices.rawValue)
    guard known["ok"]?.bool == true else { return known }
    var reports: [JSONValue] = []
    for device in known["devices"]?.array ?? [] {
      guard let id = device["id"]?.string else { continue }
      guard device["pid"]?.unsigned != nil else {
        reports.append(.record(["id": .string(id), "upgraded": .bool(false), "text": .string("its back end was started by hand")]))
        continue
      }
      let answer = try ask(ReplaceOrder(id: id, source: .same).line)
      if answer["ok"]?.bool != true {
        return .record([
          "ok": .bool(false), "error": .string("\(id): \(answer["error"]?.string ?? "no answer that can be read")"),
          "devices": .array(reports),
        ])
      }
      reports.append(.record(["id": .string(id), "upgraded": .bool(true), "gap_us": answer["gap_us"] ?? .null]))
      if !isJSON { Output.standard.write(ControlText.upgraded(reports[reports.count - 1])) }
    }
    // The supervisor comes last, so that what it does for the devices is done by one that knows them.
    var supervisor = JSONValue.record(["upgraded": .bool(true)])
    let information = try ask(ControlVerb.info.rawValue)
    if information["sandbox"]?.string == "off" {
      supervisor = .record(["upgraded": .bool(false), "text": .string("with --sandbox off it has no spawner, which does half of the work")])
    } else {
      let answer = try ask(ControlVerb.upgradeSupervisor.rawValue)
      if answer["ok"]?.bool != true {
        return .record([
          "ok": .bool(false), "error": .string("the supervisor: \(answer["error"]?.string ?? "no answer that can be read")"),
          "devices": .array(reports),
        ])
      }
    }
    if !isJSON { Output.standard.write(ControlText.upgraded(supervisor: supervisor)) }
    return .record(["ok": .bool(true), "devices": .array(reports), "supervisor": supervisor])
  }

  func perform() -> ExitCode {
    let answer: JSONValue
    do throws(SystemError) {
      if verb == .upgrade { return show(answer: try upgrade()) }
      let line = try LineSocket(path)
      try line.send((verb == .replace ? words : [verb.rawValue] + words).joined(separator: " "))
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
    return show(answer: answer)
  }

  private func show(answer: JSONValue) -> ExitCode {
    let isDone = answer["ok"]?.bool == true
    if !isJSON, !isDone, verb == .replace { Output.standard.write(ControlText.findings(answer)) }
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
