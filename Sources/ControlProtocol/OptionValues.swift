/// One value of one option, split into parts whose keys the option knows. The accessors turn a part into a checked
/// value or say what the key wants.
package struct OptionValues: Sendable {
  package let option: String
  package let example: String
  /// The value as it was written.
  package let text: String
  let parts: [ListGrammar.Part]

  package func has(word: String) -> Bool { parts.contains { $0.key == word && $0.value == nil } }
  package func has(key: String) -> Bool { self[key] != nil }

  package subscript(key: String) -> String? { parts.first { $0.key == key && $0.value != nil }?.value }

  package func required(_ key: String) throws(ConfigurationError) -> String {
    guard let value = self[key] else { throw .missingKey(option: option, key: key, example: example) }
    return value
  }

  package func onOff(_ key: String, default fallback: Bool) throws(ConfigurationError) -> Bool {
    guard let text = self[key] else { return fallback }
    guard let value = Quantity.onOff(text) else { throw bad(key, "on or off") }
    return value
  }

  /// A number within `range`, or nil when the key is absent.
  package func number(_ key: String, in range: ClosedRange<UInt64>) throws(ConfigurationError) -> UInt64? {
    guard let text = self[key] else { return nil }
    guard let value = Quantity.unsigned(text), range.contains(value) else {
      throw bad(key, "a number from \(range.lowerBound) to \(range.upperBound)")
    }
    return value
  }

  /// A virtqueue size: a power of two up to `VMConfiguration.Limits.queueSize` (virtio 1.2, section 2.7).
  package func queueSize(_ key: String) throws(ConfigurationError) -> UInt16? {
    guard let text = self[key] else { return nil }
    guard let value = Quantity.unsigned(text), let size = VMConfiguration.checkedQueueSize(value) else {
      throw bad(key, "a power of two from 2 to \(VMConfiguration.Limits.queueSize)")
    }
    return size
  }

  /// A path: not empty, no NUL, shorter than PATH_MAX.
  package func path(_ key: String) throws(ConfigurationError) -> String? {
    guard let text = self[key] else { return nil }
    guard VMConfiguration.isPath(text) else { throw bad(key, "a path of 1 to 4095 bytes") }
    return text
  }

  /// A Unix socket path, which the kernel limits to 107 bytes (`sun_path`, unix(7)).
  package func socketPath(_ key: String) throws(ConfigurationError) -> String? {
    guard let text = self[key] else { return nil }
    guard VMConfiguration.isSocketPath(text) else { throw bad(key, "a socket path of 1 to 107 bytes") }
    return text
  }

  /// A device id.
  package func id() throws(ConfigurationError) -> String? {
    guard let text = self["id"] else { return nil }
    guard VMConfiguration.isName(text) else { throw bad("id", VMConfiguration.nameRule) }
    return text
  }

  package func bad(_ key: String, _ expected: String) -> ConfigurationError {
    .badValue(place: "--\(option) \(key)", value: self[key] ?? text, expected: expected)
  }

  /// For options without keys.
  package func badText(_ expected: String) -> ConfigurationError {
    .badValue(place: "--\(option)", value: text, expected: expected)
  }
}
