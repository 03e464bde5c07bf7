import ControlProtocol

/// The answers of a VM as people read them.
enum ControlText {
  static func describe(_ verb: ControlVerb, _ answer: JSONValue) -> String {
    switch verb {
    case .info: info(answer)
    case .devices: devices(answer)
    case .pause: "paused\n"
    case .resume: "running\n"
    case .powerButton: "power button pressed\n"
    case .reboot: "reset\n"
    case .shutdown: "shut down\n"
    case .stats: statistics(answer)
    case .resizeDisk: "the guest is told\n"
    case .conversation: answer["conversation"]?.string ?? ""
    case .upgradeSupervisor:
      answer["changed"]?.bool == true
        ? "the supervisor has been upgraded\n" : "the installed supervisor could take over; nothing has changed\n"
    case .events: (answer["events"]?.array ?? []).map(event).joined()
    case .add: "\(answer["id"]?.string ?? "") is in slot \(number(answer["slot"]))\n" + (answer["text"]?.string.map { $0 + "\n" } ?? "")
    case .replace: replaced(answer)
    // Said device by device.
    case .upgrade: ""
    case .remove: "\(answer["id"]?.string ?? "") is removed\n"
    }
  }

  /// What was found of a back end that might take over, a line each.
  static func findings(_ answer: JSONValue) -> String {
    let rows = (answer["findings"]?.array ?? []).map { finding in
      [finding["verdict"]?.string ?? "", finding["subject"]?.string ?? "", finding["text"]?.string ?? ""]
    }
    return rows.isEmpty ? "" : Output.table(rows)
  }

  private static func replaced(_ answer: JSONValue) -> String {
    if answer["dry_run"]?.bool == true { return findings(answer) + "it could take over; nothing has changed\n" }
    return findings(answer) + "served by \(answer["program"]?.string ?? "") now, after \(microseconds(answer["gap_us"]))\n"
  }

  static func upgraded(supervisor: JSONValue) -> String {
    guard supervisor["upgraded"]?.bool == true else { return "the supervisor: left as it is; \(supervisor["text"]?.string ?? "")\n" }
    return "the supervisor: upgraded\n"
  }

  /// One device of an upgrade.
  static func upgraded(_ device: JSONValue) -> String {
    let id = device["id"]?.string ?? ""
    guard device["upgraded"]?.bool == true else { return "\(id): left as it is; \(device["text"]?.string ?? "")\n" }
    return "\(id): upgraded, after \(microseconds(device["gap_us"]))\n"
  }

  private static func microseconds(_ value: JSONValue?) -> String {
    value?.unsigned.map { "\($0 / 1000).\(String(1000 + $0 % 1000).dropFirst()) ms" } ?? "-"
  }

  /// One event, a line.
  static func event(_ value: JSONValue) -> String {
    if value["event"]?.string == "missed" { return "(\(number(value["count"])) events were lost, because they were read too slowly)\n" }
    var words = [value["time"]?.string ?? "", value["device"]?.string ?? "-", value["event"]?.string ?? ""]
    for member in value.members ?? [] where !["number", "time", "time_ns", "event", "device", "text"].contains(member.name) {
      if let number = member.value.unsigned {
        words.append(member.name.hasSuffix("_ns") ? "\(member.name.dropLast(3))=\(number / 1000) us" : "\(member.name)=\(number)")
      }
    }
    if let text = value["text"]?.string { words.append(text) }
    return words.joined(separator: "  ") + "\n"
  }

  private static func statistics(_ answer: JSONValue) -> String {
    var rows = [
      [
        "DEVICE", "QUEUE", "REQUESTS", "READ", "WRITTEN", "ERRORS", "KICKS", "MERGED", "CALLS", "P50 READ", "P99 READ", "P50 WRITE",
        "P99 WRITE",
      ]
    ]
    for device in answer["devices"]?.array ?? [] {
      // Read and written as the guest sees it: what the device writes into memory was read from the disk.
      for queue in device["queues"]?.array ?? [] {
        func latency(_ kind: String, _ value: String) -> String {
          queue[kind]?[value]?.unsigned.map { "\($0 / 1000).\($0 % 1000 / 100) us" } ?? "-"
        }
        rows.append([
          device["id"]?.string ?? "", number(queue["queue"]), number(queue["requests"]), number(queue["bytes_written"]),
          number(queue["bytes_read"]), number(queue["errors"]), number(queue["kicks"]), number(queue["merged_kicks"]),
          number(queue["calls"]), latency("latency_reads", "p50_ns"), latency("latency_reads", "p99_ns"),
          latency("latency_writes", "p50_ns"), latency("latency_writes", "p99_ns"),
        ])
      }
    }
    return Output.table(rows)
  }

  private static func info(_ answer: JSONValue) -> String {
    var rows = [
      ["name", answer["name"]?.string ?? ""], ["state", answer["state"]?.string ?? ""],
      ["processors", number(answer["cpus"])],
      ["memory", answer["memory"]?.unsigned.map(Quantity.describe(byteCount:)) ?? ""],
      ["kernel", answer["kernel"]?.string ?? ""],
    ]
    if let time = answer["uptime_ns"]?.unsigned { rows.append(["running for", duration(time)]) }
    if let resets = answer["resets"]?.unsigned { rows.append(["resets", "\(resets)"]) }
    var text = Output.table(rows)
    let processes = answer["processes"]?.array ?? []
    text += "\n" + Output.table([["PROCESS", "PROGRAM", "PID", "UID", "STATE"]] + processes.map(process))
    return text
  }

  private static func process(_ value: JSONValue) -> [String] {
    [
      value["id"]?.string ?? "", value["program"]?.string ?? "", number(value["pid"]), number(value["uid"]),
      value["process"]?.string ?? "",
    ]
  }

  private static func devices(_ answer: JSONValue) -> String {
    var rows = [
      ["DEVICE", "TYPE", "SLOT", "PROGRAM", "PID", "UID", "CPU", "MEMORY", "THREADS", "READ", "WRITTEN", "STATE", "QUEUES", "FEATURES"]
    ]
    for device in answer["devices"]?.array ?? [] {
      let queues = (device["queues"]?.array ?? []).map { queue in
        let waits = queue["waiting_ns"]?.unsigned.map { " (\(queue["waiting"]?.unsigned.map(String.init) ?? "some") wait \(duration($0)))" }
        return number(queue["size"]) + (queue["enabled"]?.bool == true ? "" : "-") + (waits ?? "")
      }
      let features = (device["features"]?.array ?? []).compactMap(\.string)
      rows.append([
        device["id"]?.string ?? "", device["type"]?.string ?? "", number(device["slot"]),
        device["program"]?.string ?? "", number(device["pid"]), number(device["uid"]),
        device["cpu_ns"]?.unsigned.map(duration) ?? "-", amount(device, "memory_rss"), number(device["usage"]?["threads"]),
        amount(device, "group_io_read", or: "io_read"), amount(device, "group_io_written", or: "io_written"),
        device["state"]?.string ?? "",
        queues.joined(separator: ","), features.joined(separator: " "),
      ])
    }
    return Output.table(rows)
  }

  /// Bytes of what a process uses: `3.2M`.
  private static func amount(_ device: JSONValue, _ key: String, or other: String = "") -> String {
    guard let count = (device["usage"]?[key] ?? device["usage"]?[other])?.unsigned else { return "-" }
    for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] as [(UInt64, String)] where count >= 1 << shift {
      let tenths = (count >> shift) * 10 + (count & ((1 << shift) - 1)) * 10 >> shift
      return tenths % 10 == 0 || tenths >= 1000 ? "\(tenths / 10)\(unit)" : "\(tenths / 10).\(tenths % 10)\(unit)"
    }
    return "\(count)"
  }

  private static func number(_ value: JSONValue?) -> String { value?.unsigned.map { "\($0)" } ?? "-" }

  /// `1 h 2 min 3 s`, or `0.250 s`.
  static func duration(_ nanoseconds: UInt64) -> String {
    let seconds = nanoseconds / 1_000_000_000
    if seconds < 60 {
      let fraction = String(1000 + nanoseconds / 1_000_000 % 1000).dropFirst()
      return "\(seconds).\(fraction) s"
    }
    let parts = [(seconds / 3600, "h"), (seconds / 60 % 60, "min"), (seconds % 60, "s")]
    return parts.filter { $0.0 > 0 }.map { "\($0.0) \($0.1)" }.joined(separator: " ")
  }
}
