import HostSystem

extension Verb {
  /// Between a front end and a back end.
  package static let record = Verb(
    name: "record", summary: "stands between a front end and a back end and writes down what they say",
    notes: """
      The front end connects to --listen, and every connection of its is joined to a new one to the back end; descriptors are
      passed on. Where the log goes to standard output, it is readable as it grows. The back end's own channel, once it is
      passed, goes through here as well. --output writes a file for replay.
      """,
    options: [
      OptionRow("listen", "PATH", "where the front end connects"),
      OptionRow("output", "PATH", "the recording"),
      OptionRow("log", "PATH", "the readable log (default: standard output)"),
      OptionRow("once", nil, "end when the first front end has left"),
    ],
    run: { options throws(ProbeError) in
      guard let path = options.text("listen") else { throw .badOption("listen", why: "is needed: where the front end is to connect") }
      guard path.utf8.count <= 107 else { throw .badOption("listen", why: "is longer than the 107 bytes of a socket path") }
      let interruption = try Interruption()
      let target = try Target(options)
      defer { target.close() }
      let device = options.has("type") ? try DeviceGuess.device(options, Offer()).device : nil
      let recorder = try Recorder(target, device, listen: path, output: options.text("output"), log: options.text("log"))
      try recorder.run(interruption, once: options.has("once"))
      Output.error("martlet probe: \(recorder.messageCount) messages in \(recorder.connectionCount) connections")
      return .passed
    })

  /// The front end's half again.
  package static let replay = Verb(
    name: "replay", summary: "says the front end's half of a recording to a back end and compares the answers",
    notes: """
      Descriptors are of the same kinds and sizes as they were, and empty: memory without requests, eventfds, sockets. Where a ring
      stands is therefore not compared; everything else is. An answer that differs or is missing is a finding. What the back end
      asks on its own channel is answered as it was then, and not compared: it depends on what happens meanwhile.
      """,
    options: [
      OptionRow("input", "PATH", "the recording"),
      OptionRow("adapt", nil, "acknowledge only features that this back end offers, as a front end would"),
      OptionRow("verbose", nil, "print every message"),
    ],
    run: { options throws(ProbeError) in
      guard let path = options.text("input") else { throw .badOption("input", why: "is needed: a file that record wrote") }
      let bytes = try wrapping { () throws(SystemError) in try OwnedFD.open(path, 0).readToEnd(limit: 1 << 28) }
      let recording = try Recording(String(decoding: bytes, as: UTF8.self), name: path)
      let interruption = try Interruption()
      let target = try Target(options)
      defer { target.close() }
      let replayer = Replayer(target, interruption, verbose: options.has("verbose"), adapts: options.has("adapt"))
      try replayer.run(recording)
      for difference in replayer.differences { Output.line(difference) }
      Output.line(
        "\(replayer.sentCount) messages sent, \(replayer.replyCount) answers, \(replayer.differences.count) differ or are missing"
          + (replayer.channelCount > 0 ? "; \(replayer.channelCount) requests on the back end's own channel" : "")
          + (interruption.happened ? "; interrupted" : ""))
      if replayer.offersDiffer, !options.has("adapt") {
        Output.line("This back end offers other features than the recorded one; with --adapt only what it offers is acknowledged")
      }
      return replayer.differences.isEmpty ? .passed : .findings
    })

  /// A recording in words.
  package static let decode = Verb(
    name: "decode", summary: "prints a recording in words; needs no back end",
    notes: """
      Recordings are made by record, by martlet run --flight-recorder, and by martlet ctl conversation.
      """,
    reachesBackEnd: false,
    options: [
      OptionRow("input", "PATH", "the recording"),
      OptionRow("type", "TYPE", "the device, to call its feature bits by name"),
    ],
    run: { options throws(ProbeError) in
      guard let path = options.text("input") else { throw .badOption("input", why: "is needed: a recording") }
      let bytes = try wrapping { () throws(SystemError) in try OwnedFD.open(path, 0).readToEnd(limit: 1 << 28) }
      let recording = try Recording(String(decoding: bytes, as: UTF8.self), name: path)
      let device = options.has("type") ? try DeviceGuess.device(options, Offer()).device : nil
      for (index, connection) in recording.connections.enumerated() {
        Output.line("connection \(index + 1)")
        for line in connection { Output.line(line.words(device)) }
      }
      return .passed
    })
}
